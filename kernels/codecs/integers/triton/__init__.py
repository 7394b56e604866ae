"""The codecs of whole numbers in Triton: what `append` puts and moves, `compact` fills, and `ragged_decode` multiplies,
made for any of them by its groups."""
