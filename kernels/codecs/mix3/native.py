"""mix3 in C: `native/codecs.h` knows the codec by this constant, which is set to its id when it is compiled."""

CONSTANT = "KVC_MIX3"
