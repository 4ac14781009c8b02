"""Files of musicians: read, written, read again; and files that are broken or mean harm."""

import dataclasses
import json
import re
import struct
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import guitarpro
import mido
import pytest

from parity_tests.guitar_files import SHARED_GUITAR, needs_guitar, note, small_piece
from twinformer.data.guitar import picture
from twinformer.data.guitar.arpeggio import sequences
from twinformer.data.guitar.formats import read_music, write_music
from twinformer.data.guitar.fretboard import STANDARD
from twinformer.data.guitar.notes import Note, Piece, bar_starts, with_tab
from twinformer.data.guitar.tablature import parse_tab, tab_text
from twinformer.data.guitar.tokens import piece_of, read_pieces, tokens_of
from twinformer.errors import CheckpointError, InputError


def bare(piece):
    """The same piece without tablature."""
    return dataclasses.replace(piece, notes=tuple(Note(n.start, n.pitch, n.duration) for n in piece.notes))


def places(piece):
    return [(n.start, n.string, n.fret) for n in piece.notes]


# ---- pieces


def test_a_piece_that_cannot_be_is_refused_with_every_reason():
    notes = (
        Note(-1, 60, 1),
        Note(0, 128, 0),
        Note(0, 60, 1, 2),
        Note(0, 60, 1, 6, 0),
        Note(0, 60, 1, 5, 0),
        note(0, 1, 0, 0),
    )
    with pytest.raises(InputError) as caught:
        Piece(notes, (4, 5), tempo=0)
    said = "\n".join(caught.value.problems)
    for wanted in (
        *(
            "time_signature: ",
            "tempo: ",
            "note 0: start",
            "note 1: duration",
            "note 1: pitch",
            "note 2: expected string and",
        ),
        *(
            "note 3: string: expected 0 to 5, got 6",
            "note 4: expected a place that sounds 60, got string 5, fret 0: 64",
        ),
    ):
        assert wanted in said
    for bars, end in (((3, 9), 20), ((0, 9, 9), 20), ((0, 20), 20), ((0,), 5)):
        with pytest.raises(InputError, match=r"bars: |end: "):
            Piece((Note(0, 60, 6),), bars=bars, end=end)
    with pytest.raises(InputError, match="at most 1000000 twelfths"):
        Piece((Note(10**9, 60, 1),))


def test_bars_follow_changing_time_signatures():
    assert bar_starts([(0, (4, 4)), (96, (3, 4))], 150) == ((0, 48, 96, 132), 168)
    assert bar_starts([(0, (4, 4)), (60, (2, 4))], 61) == ((0, 48, 60), 84)  # cut where the signature changes
    assert bar_starts([(0, (4, 4)), (960, (3, 4))], 0) == ((0,), 48)
    for signature in ((0, 4), (4, 0), (3, 7)):
        with pytest.raises(InputError, match="time signature at 0"):
            bar_starts([(0, signature)], 10)


def test_tab_is_put_on_a_piece():
    piece = bare(small_piece())
    assert not piece.has_tab
    tabbed = with_tab(piece, [(n.string, n.fret) for n in small_piece().notes])
    assert tabbed == small_piece()
    assert tabbed.has_tab
    with pytest.raises(InputError, match="positions: expected one a note, 10, got 1"):
        with_tab(piece, [(5, 0)])
    with pytest.raises(InputError, match="note 0: expected a place that sounds 64"):
        with_tab(piece, [(4, 4), *[(n.string, n.fret) for n in small_piece().notes][1:]])


# ---- MIDI


def test_midi_gives_everything_back(tmp_path):
    for piece in (small_piece(), bare(small_piece()), sequences("test", 1)[0].piece(title="Arpeggio")):
        write_music(piece, tmp_path / "a.mid")
        (read,) = read_music(tmp_path / "a.mid")
        assert read == piece
        assert read.remarks == ()


def test_midi_in_another_resolution_with_rounding_drums_and_notes_left_on(tmp_path):
    track = mido.MidiTrack()
    track.append(mido.MetaMessage("set_tempo", tempo=400_000))
    track.append(mido.Message("note_on", note=60, velocity=64, time=1))
    track.append(mido.Message("note_on", note=36, velocity=64, channel=9, time=0))
    track.append(mido.Message("note_on", note=60, velocity=0, time=48))  # ends the first
    track.append(mido.Message("note_off", note=61, time=0))  # was never on
    track.append(mido.Message("note_on", note=67, velocity=1, time=47))
    track.append(mido.MetaMessage("end_of_track", time=96))
    mido.MidiFile(type=1, ticks_per_beat=96, tracks=[mido.MidiTrack(), track]).save(tmp_path / "b.mid")
    (piece,) = read_music(tmp_path / "b.mid")
    assert piece.notes == (Note(0, 60, 6), Note(12, 67, 12))
    assert (piece.tempo, piece.time_signature, piece.end) == (150, (4, 4), 48)
    assert len(piece.remarks) == 3


def test_of_two_equal_notes_the_older_one_ends_first(tmp_path):
    """Two voices in unison: tokens and MIDI alike say only that one of them ends."""
    text = "PIECE_START TS=2_4 BAR_START ON=60 TD=3 ON=60 TD=3 OFF=60 TD=6 OFF=60 BAR_END PIECE_END"
    piece = piece_of(text.split())
    assert piece.notes == (Note(0, 60, 6), Note(3, 60, 9))
    write_music(piece, tmp_path / "a.mid")
    assert read_music(tmp_path / "a.mid")[0].notes == piece.notes


@needs_guitar("mutopia_valid.txt")
def test_published_pieces_survive_midi(tmp_path):
    for tokens in read_pieces(SHARED_GUITAR / "mutopia_valid.txt")[:3]:
        write_music(piece_of(tokens), tmp_path / "c.mid")
        (back,) = read_music(tmp_path / "c.mid")
        assert tokens_of(back) == tokens
        write_music(back, tmp_path / "c.txt")
        assert (tmp_path / "c.txt").read_text().split() == list(tokens)


def midi_bytes(events, division=96, type=0):
    track = b"".join(events) + b"\x00\xff\x2f\x00"
    return b"MThd" + struct.pack(">LHHH", 6, type, 1, division) + b"MTrk" + struct.pack(">L", len(track)) + track


ON = b"\x00\x90\x3c\x40"
BAD_MIDI = {
    "empty": (b"", "does not read"),
    "text": (b"not a midi file at all", "does not read"),
    "cut short": (midi_bytes([ON, b"\x60\x80\x3c\x40"])[:-9], "does not read"),
    "no such status": (midi_bytes([b"\x00\xf4\x00"]), "does not read"),
    "data byte too large": (midi_bytes([b"\x00\x90\xff\x40"]), "does not read"),
    "a key that is none": (midi_bytes([b"\x00\xff\x59\x02\x7f\x7f"]), "does not read"),
    "an enormous text": (midi_bytes([b"\x00\xff\x01\xff\xff\xff\x7f"]), "does not read"),
    "no notes": (midi_bytes([]), "expected a MIDI file with notes"),
    "an enormous wait": (midi_bytes([ON, b"\xff\xff\xff\xff\xff\xff\x7f\x80\x3c\x40"]), "at most 1000000 twelfths"),
    "SMPTE time": (midi_bytes([ON], division=0xE728), "ticks a quarter"),
    "no ticks": (midi_bytes([ON], division=0), "ticks a quarter"),
    "type 2": (midi_bytes([ON], type=2), "type 0 or 1"),
    "no beats": (midi_bytes([b"\x00\xff\x58\x04\x00\x02\x18\x08", ON, b"\x60\x80\x3c\x40"]), "time signature at 0"),
}


@pytest.mark.parametrize("kind", BAD_MIDI)
def test_broken_midi(kind, tmp_path):
    content, said = BAD_MIDI[kind]
    (tmp_path / "bad.mid").write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_music(tmp_path / "bad.mid")


# ---- MusicXML


def musicxml(piece, *, octave=12, tuned=True):
    """The piece as a score with tablature, written an octave higher: independent of the reader. No note is tied."""
    steps = [
        ("C", 0),
        ("C", 1),
        ("D", 0),
        ("D", 1),
        ("E", 0),
        ("F", 0),
        ("F", 1),
        ("G", 0),
        ("G", 1),
        ("A", 0),
        ("A", 1),
        ("B", 0),
    ]

    def pitch(number, prefix=""):
        step, alter = steps[number % 12]
        altered = f"<{prefix}alter>{alter}</{prefix}alter>" if alter else ""
        octave = f"<{prefix}octave>{number // 12 - 1}</{prefix}octave>"
        return f"<{prefix}step>{step}</{prefix}step>{altered}{octave}"

    tuning = "".join(
        f'<staff-tuning line="{i + 1}">{pitch(low, "tuning-")}</staff-tuning>' for i, low in enumerate(piece.tuning)
    )
    beats, unit = piece.time_signature
    measures = []
    for number, (start, end) in enumerate(zip(piece.bars, piece.bar_ends, strict=True)):
        content = ""
        if number == 0:
            content += (
                f"<attributes><divisions>24</divisions><time><beats>{beats}</beats><beat-type>{unit}</beat-type></time>"
            )
            content += f"<staff-details>{tuning if tuned else ''}</staff-details></attributes>"
            content += f'<direction><sound tempo="{piece.tempo}"/></direction>'
        content += f"<forward><duration>{2 * (end - start)}</duration></forward>"
        for n in piece.notes:
            if start <= n.start < end:
                back = 2 * (end - n.start)
                content += f"<backup><duration>{back}</duration></backup><note><pitch>{pitch(n.pitch + octave)}</pitch>"
                content += f"<duration>{2 * n.duration}</duration><notations><technical><string>{6 - n.string}</string>"
                content += f"<fret>{n.fret}</fret></technical></notations></note>"
                content += f"<forward><duration>{back - 2 * n.duration}</duration></forward>"
        measures.append(f'<measure number="{number + 1}">{content}</measure>')
    head = '<?xml version="1.0"?><!DOCTYPE score-partwise PUBLIC "-//Recordare//DTD MusicXML 4.0 Partwise//EN" '
    head += '"http://www.musicxml.org/dtds/partwise.dtd">'
    work = f"<work><work-title>{piece.title}</work-title></work>"
    return f'{head}<score-partwise>{work}<part id="P1">{"".join(measures)}</part></score-partwise>'


def test_musicxml_gives_everything_back(tmp_path):
    for piece in (small_piece(), sequences("test", 2)[1].piece(title="Arpeggio")):
        (tmp_path / "a.musicxml").write_text(musicxml(piece))
        (read,) = read_music(tmp_path / "a.musicxml")
        assert read == piece
        assert [remark for remark in read.remarks if "written pitch" in remark]  # an octave off, and said so
    dropped = dataclasses.replace(small_piece(), tuning=(38, *STANDARD[1:]), notes=(Note(0, 41, 12, 0, 3),))
    (tmp_path / "a.xml").write_text(musicxml(dropped, octave=0))
    assert read_music(tmp_path / "a.xml")[0] == dropped
    with zipfile.ZipFile(tmp_path / "a.mxl", "w") as archive:
        archive.writestr("META-INF/container.xml", "<container/>")
        archive.writestr("score.xml", musicxml(dropped))
    assert read_music(tmp_path / "a.mxl")[0] == dropped


SCORE = """<score-partwise><part><measure>
<attributes><divisions>{divisions}</divisions>
<transpose><chromatic>0</chromatic><octave-change>-1</octave-change></transpose></attributes>
{notes}</measure></part></score-partwise>"""


def xml_note(step, octave, duration, *extra):
    place = f"<pitch><step>{step}</step><octave>{octave}</octave></pitch>"
    chord, rest = [e for e in extra if e == "<chord/>"], [e for e in extra if e != "<chord/>"]
    return f"<note>{''.join(chord)}{place}<duration>{duration}</duration>{''.join(rest)}</note>"


def test_musicxml_ties_chords_rests_grace_notes_and_transposition(tmp_path):
    notes = [
        xml_note("E", 5, 2, '<tie type="start"/>'),
        xml_note("C", 4, 2, "<chord/>"),
        xml_note("E", 5, 1, '<tie type="stop"/>'),
        "<note><rest/><duration>1</duration></note>",
        "<note><grace/><pitch><step>B</step><octave>4</octave></pitch></note>",
        xml_note("G", 4, 4),
    ]
    file = tmp_path / "b.xml"
    file.write_text(SCORE.format(divisions=2, notes="".join(notes)))
    (piece,) = read_music(file)
    assert piece.notes == (Note(0, 48, 12), Note(0, 64, 18), Note(24, 55, 24))
    assert piece.remarks == ("1 × grace and cue notes left out",)


def test_musicxml_of_two_staves_is_read_once(tmp_path):
    fret = "<notations><technical><string>1</string><fret>3</fret></technical></notations>"
    notes = (
        xml_note("G", 5, 2, "<staff>1</staff>")
        + "<backup><duration>2</duration></backup>"
        + xml_note("G", 5, 2, fret, "<staff>2</staff>")
    )
    file = tmp_path / "b.xml"
    file.write_text(SCORE.format(divisions=2, notes=notes))
    (piece,) = read_music(file)
    assert piece.notes == (note(0, 12, 5, 3),)
    assert "1 × notes of a staff without tablature left out" in piece.remarks


ENTITIES = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;">]>'
BOMB = f"{ENTITIES}<score-partwise>&c;</score-partwise>"
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><score-partwise><part>&a;</part></score-partwise>'
BAD_XML = {
    "bomb": (BOMB, "without entities"),
    "outside": (OUTSIDE, "without entities"),
    "not XML": ("PIECE_START", "does not parse"),
    "empty": ("", "does not parse"),
    "another root": ("<score-timewise/>", "root <score-partwise>, got <score-timewise>"),
    "no notes": ("<score-partwise><part/></score-partwise>", "expected a part with notes"),
    "no duration": (SCORE.format(divisions=1, notes=xml_note("C", 4, "")), "expected a number, got ''"),
    "a step that is none": (
        SCORE.format(divisions=1, notes=xml_note("H", 4, 1)),
        "step: expected one of A to G, got 'H'",
    ),
    "no divisions": (SCORE.format(divisions=0, notes=xml_note("C", 4, 1)), "divisions: expected a positive number"),
    "not a number": (SCORE.format(divisions="nan", notes=xml_note("C", 4, 1)), "expected a number, got 'nan'"),
    "beyond": (SCORE.format(divisions=1, notes=xml_note("C", 4, 999_999)), "at most 1000000 twelfths"),
    "a pitch beyond": (SCORE.format(divisions=1, notes=xml_note("C", 11, 1)), "pitch: expected 0 to 127"),
    "no such string": (
        SCORE.format(
            divisions=1,
            notes=xml_note("C", 4, 1, "<notations><technical><string>7</string><fret>1</fret></technical></notations>"),
        ),
        "expected string 1 to 6 and fret 0 to 36, got 7 and 1",
    ),
}


@pytest.mark.parametrize("kind", BAD_XML)
def test_broken_and_hostile_musicxml(kind, tmp_path):
    content, said = BAD_XML[kind]
    (tmp_path / "bad.xml").write_text(content)
    with pytest.raises(InputError, match=said):
        read_music(tmp_path / "bad.xml")


def test_the_bomb_is_one():
    """The plain parser expands it, so the refusal is defusedxml's doing."""
    assert ElementTree.fromstring(BOMB).text == "ha" * 16


def test_archives_that_mean_harm(tmp_path, monkeypatch):
    monkeypatch.setattr("twinformer.data.guitar.musicxml._MAX_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "a.mxl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("score.xml", " " * 1_000_000)
    assert (tmp_path / "a.mxl").stat().st_size < 10_000
    with pytest.raises(InputError, match="expected at most 10000 bytes of score"):
        read_music(tmp_path / "a.mxl")
    with zipfile.ZipFile(tmp_path / "b.mxl", "w") as archive:
        archive.writestr("picture.png", "")
    with pytest.raises(InputError, match="archive with a score"):
        read_music(tmp_path / "b.mxl")
    (tmp_path / "c.xml").write_text(" " * 20_000)
    with pytest.raises(InputError, match="expected at most 10000 bytes of score"):
        read_music(tmp_path / "c.xml")


# ---- JAMS


def jams(piece, *, shift=0.3, columns=False):
    """The piece in seconds, its beats where the metronome puts them, pitches a little off."""
    beat = 60 / piece.tempo
    annotations = []
    for string in range(6):
        rows = [
            {
                "time": shift + n.start / 12 * beat,
                "duration": n.duration / 12 * beat,
                "value": n.pitch + 0.2,
                "confidence": None,
            }
            for n in piece.notes
            if n.string == string
        ]
        data = {name: [row[name] for row in rows] for name in ("time", "duration", "value")} if columns else rows
        annotations.append(
            {"namespace": "note_midi", "annotation_metadata": {"data_source": str(string)}, "data": data}
        )
    beats = [
        {"time": shift + i * beat, "value": {"position": i % 4 + 1, "num_beats": 4, "measure": i // 4 + 1}}
        for i in range(piece.end // 12)
    ]
    annotations.append({"namespace": "beat_position", "data": beats})
    return {"annotations": annotations, "file_metadata": {}}


def test_jams_give_everything_back(tmp_path):
    file = tmp_path / "00_BN1-129-Eb_comp.jams"
    whole = sequences("test", 2)[1].piece()
    for columns in (False, True):
        file.write_text(json.dumps(jams(whole, columns=columns)))
        (read,) = read_music(file)
        assert read.notes == whole.notes
        assert (read.tempo, read.time_signature, read.bars) == (whole.tempo, (4, 4), whole.bars)
    document = jams(whole, shift=0.0)
    del document["annotations"][-1]
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match="tempo: expected annotated beats or a tempo, got neither"):
        read_music(file)
    assert read_music(file, tempo=120.0)[0].notes == whole.notes
    document["annotations"].append({"namespace": "tempo", "data": [{"time": 0, "duration": 9, "value": 120}]})
    file.write_text(json.dumps(document))
    assert read_music(file)[0].notes == whole.notes


def test_jams_follow_a_player_who_slows_down(tmp_path):
    document = jams(sequences("test", 2)[1].piece(), shift=0.0)
    for annotation in document["annotations"]:
        for row in annotation["data"]:
            end = (row["time"] + row.get("duration", 0)) ** 1.2  # everything later, and ever more so
            row["time"] **= 1.2
            if "duration" in row:
                row["duration"] = end - row["time"]
    (tmp_path / "a.jams").write_text(json.dumps(document))
    (read,) = read_music(tmp_path / "a.jams")
    whole = sequences("test", 2)[1].piece()
    assert [(n.string, n.fret) for n in read.notes] == [(n.string, n.fret) for n in whole.notes]
    assert all(abs(a.start - b.start) <= 1 for a, b in zip(read.notes, whole.notes, strict=True))


GOOD_NOTE = {"time": 0.0, "duration": 1.0, "value": 40.0}


def jams_with(data, source="0"):
    tempo = {"namespace": "tempo", "data": [{"value": 120}]}
    entry = {"namespace": "note_midi", "annotation_metadata": {"data_source": source}, "data": data}
    return json.dumps({"annotations": [tempo, entry]})


BAD_JAMS = {
    "not JSON": ("{", "text that does not parse"),
    "deep": ("[" * 100_000, "text that does not parse"),
    "a list": ("[]", "expected JAMS"),
    "no list": ('{"annotations": {}}', "expected JAMS"),
    "no notes": ('{"annotations": []}', "expected annotations of the namespace note_midi"),
    "no such string": (jams_with([GOOD_NOTE], "6"), "data_source: expected another string, 0 to 5, got '6'"),
    "data of another kind": (jams_with(3), "data: expected a list, got int"),
    "text for a number": (jams_with([GOOD_NOTE | {"value": "E2"}]), "note 0: expected time, duration from 0"),
    "not finite": (jams_with([GOOD_NOTE | {"time": float("nan")}]), "note 0: expected time"),
    "before the beginning": (jams_with([GOOD_NOTE | {"time": -1}]), "note 0: expected time"),
    "below its string": (jams_with([GOOD_NOTE | {"value": 30}]), "expected notes on their strings, got none"),
    "far beyond": (jams_with([GOOD_NOTE | {"time": 1e12}]), "at most 1000000 twelfths"),
}


@pytest.mark.parametrize("kind", BAD_JAMS)
def test_wrong_jams(kind, tmp_path):
    content, said = BAD_JAMS[kind]
    (tmp_path / "bad.jams").write_text(content)
    with pytest.raises(InputError, match=said):
        read_music(tmp_path / "bad.jams")


# ---- Guitar Pro


def gp_song():
    song = guitarpro.Song(tempo=96, title="Song")
    track = song.tracks[0]
    measure = track.measures[0]
    voice = measure.voices[0]
    line = [(4, 3, "normal"), (4, 3, "tie"), (8, 5, "normal"), (8, 0, "dead"), (4, None, "rest")]
    for value, fret, kind in line:
        beat = guitarpro.Beat(voice, duration=guitarpro.Duration(value=value), status=guitarpro.BeatStatus.normal)
        if fret is None:
            beat.status = guitarpro.BeatStatus.rest
        else:
            beat.notes.append(guitarpro.Note(beat, value=fret, string=2, type=guitarpro.NoteType[kind]))
        voice.beats.append(beat)
    return song


@pytest.mark.parametrize("kind", ["gp3", "gp4", "gp5"])
def test_guitar_pro(kind, tmp_path):
    file = tmp_path / f"a.{kind}"
    guitarpro.write(gp_song(), str(file))
    (piece,) = read_music(file)
    assert piece.notes == (note(0, 24, 4, 3), note(24, 6, 4, 5))
    assert (piece.tempo, piece.time_signature, piece.bars, piece.end, piece.title) == (96, (4, 4), (0,), 48, "Song")
    assert piece.remarks == ("1 × dead notes left out",)
    with pytest.raises(InputError, match=r"track: expected one with six strings of: 0 'Track 1'.*; got 1"):
        read_music(file, track=1)


def test_guitar_pro_that_does_not_read(tmp_path, monkeypatch):
    file = tmp_path / "a.gp5"
    guitarpro.write(gp_song(), str(file))
    whole = file.read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2], whole[:40] + b"\xff" * 400):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"expected Guitar Pro 3 to 5|expected a track with notes"):
            read_music(file)
    monkeypatch.setitem(sys.modules, "guitarpro", None)
    with pytest.raises(InputError, match=r"expected PyGuitarPro to be installed.*twinformer\[guitarpro\]"):
        read_music(file)


# ---- tablature


def test_tablature_by_hand():
    piece = Piece(
        (note(0, 12, 0, 3), note(12, 12, 5, 10), note(18, 6, 4, 0), note(24, 12, 3, 2)), (2, 4), title="By hand"
    )
    assert tab_text(piece) == (
        "By hand\n\ntwinformer tablature: 2/4, tempo 120, tuning 40 45 50 55 59 64, width 3\n\n"
        "e|-------10----|-------|\nB|----------0--|-------|\nG|-------------|-2-----|\n"
        "D|-------------|-------|\nA|-------------|-------|\nE|-3-----------|-------|\n"
    )


def test_tablature_gives_places_back(tmp_path):
    for width in (20, 60, 200):
        for piece in (
            small_piece(),
            sequences("test", 3)[2].piece(title="Arpeggio"),
            dataclasses.replace(small_piece(), title=""),
        ):
            write_music(piece, tmp_path / "a.tab", line_width=width)
            (read,) = read_music(tmp_path / "a.tab")
            assert places(read) == places(piece)
            assert (read.bars, read.end, read.time_signature, read.title) == (
                piece.bars,
                piece.end,
                piece.time_signature,
                piece.title,
            )
            assert (read.tempo, read.tuning) == (piece.tempo, piece.tuning)


def test_tablature_as_people_type_it():
    text = """A song

e|-----0---|--------|
B|---1---1-|-3h5----|
G|-0-------|--------|
D|---------|--------|
A|-3-------|------12|
E|---------|--------|
"""
    piece = parse_tab(text)
    assert places(piece) == [
        (0, 1, 3),
        (0, 3, 0),
        (6, 4, 1),
        (12, 5, 0),
        (18, 4, 1),
        (24, 4, 3),
        (30, 4, 5),
        (36, 1, 12),
    ]
    assert piece.bars == (0, 24)
    assert "no header" in piece.remarks[0]
    assert [n.start for n in parse_tab(text, step=3).notes][-1] == 18


GOOD_TAB = tab_text(small_piece())
BAD_TAB = {
    "nothing": ("no tablature here", "expected tablature, lines of 6 strings, got none"),
    "five lines": ("\n".join(GOOD_TAB.splitlines()[:9]), "expected 6 lines with bars equally long, got 5 lines"),
    "ragged": (GOOD_TAB.replace("G|-", "G|--", 1), "expected 6 lines with bars equally long"),
    "off the grid": (GOOD_TAB.replace("G|----|", "G|--7-|", 1), "expected '7' at the start of a column"),
    "fewer bars": (GOOD_TAB.replace("bars 12 36 48", "bars 12 36"), "expected a length of each of 3, got"),
    "no length": (GOOD_TAB.replace("bars 12 36 48", "bars 0 36 48"), "expected a length of each of 3"),
    "columns that do not divide": (GOOD_TAB.replace("bars 12 36 48", "bars 12 37 48"), "that divide 37"),
    "a pitch beyond": (GOOD_TAB.replace("tuning 40", "tuning 126"), "expected 0 to 127"),
    "a fret beyond": (GOOD_TAB.split("\n\n")[2].replace("-3-", "99-", 1), "expected frets up to 36"),
}


@pytest.mark.parametrize("kind", BAD_TAB)
def test_wrong_tablature(kind):
    content, said = BAD_TAB[kind]
    assert content not in (GOOD_TAB, GOOD_TAB.split("\n\n")[2])
    with pytest.raises(InputError, match=said):
        parse_tab(content)


def test_tablature_needs_strings_of_its_own():
    with pytest.raises(InputError, match="note 0: expected a string and a fret, got none"):
        tab_text(bare(small_piece()))
    twice = Piece((note(0, 6, 3, 0), note(0, 6, 3, 2)))
    with pytest.raises(InputError, match="note 1: expected string 3 to be free at 0, got two notes on it"):
        tab_text(twice)


# ---- pictures


def test_pictures_show_every_fret_where_it_is(tmp_path):
    piece = small_piece()
    figure = picture.draw_tab(piece, marked={3}, caption="one wrong")
    texts = figure.axes[0].texts
    frets = [t for t in texts if t.get_bbox_patch() is not None]
    assert [t.get_text() for t in frets] == [str(n.fret) for n in piece.notes]
    heights = {n.string: t.get_position()[1] for n, t in zip(piece.notes, frets, strict=True)}
    assert sorted(heights, key=heights.get) == sorted(heights)  # the lowest string lowest
    across = [t.get_position()[0] for t in frets]
    assert all(
        (a < b) == (m.start < n.start)
        for a, b, m, n in zip(across, across[1:], piece.notes, piece.notes[1:], strict=False)
    )
    assert [t.get_color() for t in frets].count(frets[3].get_color()) == 1
    assert "one wrong" in [t.get_text() for t in texts]
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        write_music(piece, tmp_path / f"a.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes().startswith(start)


def test_long_pieces_go_on_in_new_lines():
    piece = Piece(tuple(note(48 * i, 12, i % 6, 2) for i in range(12)))
    few, many = picture.draw_tab(piece, width=20), picture.draw_tab(piece, width=6)
    assert many.get_size_inches()[1] > few.get_size_inches()[1]
    numbers = [t for t in many.axes[0].texts if t.get_bbox_patch() is not None]
    right = max(t.get_position()[0] for t in numbers)
    assert len(numbers) == 12
    assert right < 6


def test_pictures_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match="expected a string and a fret for every note"):
        picture.draw_tab(bare(small_piece()))
    with pytest.raises(InputError, match=r"bar 0: expected at most 9.0 inches"):
        picture.draw_tab(Piece((note(0, 12, 0, 0),), (64, 1)))
    with pytest.raises(InputError, match="inches of height"):
        picture.draw_tab(Piece(tuple(note(48 * i, 1, 0, 0) for i in range(3000)), tempo=60), width=4)
    with pytest.raises(InputError, match=r"ends in one of svg, png, pdf, got '.gif'"):
        picture.write_picture(small_piece(), tmp_path / "a.gif")


# ---- by name


def test_names_that_say_no_kind(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(InputError, match=r"ends in one of \.mid, .*got '\.wav'"):
        read_music(tmp_path / "a.wav")
    with pytest.raises(InputError, match=r"ends in one of \.mid, .*got '\.gp5'"):
        write_music(small_piece(), tmp_path / "a.gp5")
    with pytest.raises(InputError, match="expected a file, got nothing by that name"):
        read_music(tmp_path / "absent.mid")
    (tmp_path / "latin.txt").write_bytes("Capricho Árabe".encode("latin1"))
    with pytest.raises(CheckpointError, match="expected UTF-8"):
        read_music(tmp_path / "latin.txt")


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "guitar.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102
    assert sorted(file.name for file in tmp_path.iterdir()) == ["played.mid", "viterbi.svg"]
