"""Real text for judging real models: sentences of several lengths, and one longer than 256 tokens."""

from __future__ import annotations

# From Lewis Carroll, "Alice's Adventures in Wonderland" (1865, public domain), chapter I.
LONG = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to "
    "do: once or twice she had peeped into the book her sister was reading, but it had no pictures or "
    "conversations in it, \u201cand what is the use of a book,\u201d thought Alice \u201cwithout pictures or "
    "conversations?\u201d So she was considering in her own mind (as well as she could, for the hot day made "
    "her feel very sleepy and stupid), whether the pleasure of making a daisy-chain would be worth the "
    "trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close "
    "by her. There was nothing so very remarkable in that; nor did Alice think it so very much out of the "
    "way to hear the Rabbit say to itself, \u201cOh dear! Oh dear! I shall be late!\u201d (when she thought it over "
    "afterwards, it occurred to her that she ought to have wondered at this, but at the time it all "
    "seemed quite natural); but when the Rabbit actually took a watch out of its waistcoat-pocket, and "
    "looked at it, and then hurried on, Alice started to her feet, for it flashed across her mind that "
    "she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out of it"
)

HAPPY = "That is a happy person"
VERY_HAPPY = "That is a very happy person"
SUNNY = "Today is a sunny day"

# three lengths: a batch is as wide as its longest, and one more row of padding shows nothing new
SENTENCES = (
    HAPPY,
    "Tune the sixth string down to D, then play the twelfth-fret harmonic \u2014 na\u00efve, but it works!",
    LONG,
)

# (one sentence, another, their cosine as the model's publishers give it)
PUBLISHED_SIMILARITIES = ((HAPPY, VERY_HAPPY, 0.9429), (HAPPY, SUNNY, 0.2569))
