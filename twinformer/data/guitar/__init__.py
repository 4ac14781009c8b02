"""Guitar: fingerings, tablature and pieces as training data, and the files that guitarists have.

Strings are numbered 0 to 5 from the lowest (E2) to the highest (E4); files that count from the highest say so where
they are read. Pitches are MIDI numbers, time is in twelfths of a quarter note.

Read in this order: ``fretboard``, ``dice``, ``vocabulary``; the chord table ``chords`` and the tasks made of it,
``arpeggio``, ``arpeggio_data``, ``baselines``, ``chord_tasks``; pieces: ``notes``, ``tokens``, ``pieces``, ``ngram``;
files: ``midi``, ``musicxml``, ``jams``, ``guitarpro``, ``tablature``, ``picture``, and ``formats``, which picks one.
"""
