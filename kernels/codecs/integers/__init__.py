"""The arithmetic that the codecs of whole numbers share (int8 to int2, and mix3 to mix1, which have several widths).

With b bits, a group's scale is s = max|x| / 2^(b-1), rounded to float16 and at least its smallest normal number 2^-14.
An element's code is c = floor(x / s), clamped to -2^(b-1) ... 2^(b-1) - 1 and stored with 2^(b-1) added. It reads as
the middle of its interval, (c + 1/2) s, so that all 2^b levels are used and lie symmetrically about 0.
"""
