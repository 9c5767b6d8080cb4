"""XMP beside images, and metadata within them, as exiftool reads both."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.collection.run import Outcome
from blip2.collection.sinks import Outputs
from blip2.collection.sinks.packet import DESCRIPTION, described, with_texts
from blip2.collection.sinks.xmp import packet
from blip2.errors import CollectionError
from blip2.image import load_image
from tests.collection.written_by_run import captioned, drawn

needs_exiftool = pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")

ATTRIBUTES = """\ufeff<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<!-- by hand -->
<x:xmpmeta xmlns:x='adobe:ns:meta/' x:xmptk="darktable">
<r:RDF xmlns:r='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>
 <r:Description r:about='' xmlns:d="http://purl.org/dc/elements/1.1/" xmlns:my="http://my.example/1/"
   xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4" d:description="an old > one" my:odd='&lt;"&gt;'/>
</r:RDF></x:xmpmeta>
<?xpacket end='w'?>   """
ELEMENTS = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"><xmp:Rating>5</xmp:Rating></rdf:Description>
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
 <dc:subject><rdf:Bag><rdf:li>cats</rdf:li></rdf:Bag></dc:subject>
 <dc:description><rdf:Alt><rdf:li xml:lang="de">ein Hund</rdf:li><rdf:li xml:lang="x-default">old</rdf:li></rdf:Alt>
 </dc:description></rdf:Description></rdf:RDF></x:xmpmeta>"""
BARE = """<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"></rdf:RDF>"""
PLAIN = ELEMENTS.replace(
    '<rdf:Alt><rdf:li xml:lang="de">ein Hund</rdf:li><rdf:li xml:lang="x-default">old</rdf:li></rdf:Alt>', "old"
)


def told_by_exiftool(*paths):
    command = ["exiftool", "-j", "-G1", "-a", *map(str, paths)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


@needs_exiftool
@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (None, {}),
        (ATTRIBUTES, {"XMP-xmp:Rating": 4}),
        (ELEMENTS, {"XMP-xmp:Rating": 5, "XMP-dc:Subject": "cats", "XMP-dc:Description-de": "ein Hund"}),
        (PLAIN, {"XMP-xmp:Rating": 5, "XMP-dc:Subject": "cats"}),
        (BARE, {}),
    ],
)
def test_exiftool_reads_them_and_all_else_is_kept(tmp_path, before, kept):
    path = tmp_path / "a.xmp"
    old = None if before is None else before.encode()
    text = 'a <b> & "c" \xe9 \U0001f436'
    path.write_bytes(packet(old, text, "a.xmp"))
    (found,) = told_by_exiftool(path)
    assert found["XMP-dc:Description"] == text and found["XMP-iptcCore:AltTextAccessibility"] == text
    assert kept.items() <= found.items()
    assert described(path.read_bytes(), "a.xmp") == text
    assert packet(path.read_bytes(), text, "a.xmp") == path.read_bytes()


HOSTILE = ELEMENTS.replace("<dc:subject>", "<dc:title>" * 5000 + "</dc:title>" * 5000 + "<dc:subject>").replace(
    'rdf:about="" xmlns:dc', """rdf:about="" dc:description='first' dc:source=" dc:description='mine' > " xmlns:dc"""
)


def test_a_packet_that_is_deep_and_says_it_twice():
    content = packet(HOSTILE.encode(), "new", "a.xmp")
    assert described(HOSTILE.encode(), "a.xmp") == "first" and described(content, "a.xmp") == "new"
    assert b"""dc:source=" dc:description='mine' > \"""" in content and b"first" not in content


def test_every_other_byte_stays():
    new = with_texts(ATTRIBUTES.encode(), {DESCRIPTION: "new"}, "a.xmp").decode()
    head, tail = ATTRIBUTES.split(' d:description="an old > one"')
    assert new.startswith(head)
    assert tail[:-3].split("/>")[0] in new and new.endswith(tail.split("/>", 1)[1])
    element = ELEMENTS.replace('<rdf:li xml:lang="x-default">old</rdf:li>', '<rdf:li xml:lang="x-default">new</rdf:li>')
    assert with_texts(ELEMENTS.encode(), {DESCRIPTION: "new"}, "a.xmp").decode() == element


@pytest.mark.parametrize(
    ("content", "text"), [(ATTRIBUTES, "an old > one"), (ELEMENTS, "old"), (PLAIN, "old"), (BARE, "")]
)
def test_what_was_said_before(content, text):
    assert described(content.encode(), "a.xmp") == text


BILLION = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>' + BARE.replace("><", ">&b;<")


@pytest.mark.parametrize("content", [b"", b"<a>", BILLION.encode(), b"\xff\xfe<\0a\0", b"<a/>", b"not xml at all"])
def test_what_is_no_xmp_is_left_alone(tmp_path, content):
    paths = drawn(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "a.jpg.xmp").write_bytes(content)
    sinks = captioned(paths, Outputs(xmp=True), if_exists="overwrite")
    assert (tmp_path / "a.jpg.xmp").read_bytes() == content
    assert described((tmp_path / "b.jpg.xmp").read_bytes(), "b") == "a b.jpg"
    with pytest.raises(CollectionError, match=r"a\.jpg\.xmp: is .* remove it"):
        sinks[0].old(paths[0]) or packet(content, "x", "a.jpg.xmp")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.sampled_from([None, ATTRIBUTES, ELEMENTS, PLAIN, BARE]))
def test_any_text_comes_back(text, before):
    from blip2.collection.wording import clean

    line = " ".join(clean(text).split())
    content = packet(None if before is None else before.encode(), line, "a.xmp")
    valid = "".join("\ufffd" if ord(letter) in (0xFFFE, 0xFFFF) else letter for letter in line)
    assert described(content, "a.xmp") == valid


def test_sidecars_of_a_library(tmp_path):
    paths = drawn(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "a.jpg.xmp").write_text(ELEMENTS)  # a person's words
    (tmp_path / "b.jpg.xmp").write_text(edited := ELEMENTS.replace(">old<", "><").replace(">ein Hund<", "><"))
    for _ in range(2):
        captioned(paths, Outputs(xmp=True), journal=tmp_path / ".blip2")
        assert (tmp_path / "a.jpg.xmp").read_text() == ELEMENTS
        assert (tmp_path / "b.jpg.xmp_original").read_text() == edited
        assert ">cats<" in (tmp_path / "b.jpg.xmp").read_text()
        assert described((tmp_path / "b.jpg.xmp").read_bytes(), "b") == "a b.jpg"
    captioned(paths, Outputs(xmp=True), lambda record: Outcome(["new"], [0.0], [1]), if_exists="overwrite",
              journal=tmp_path / "other")  # fmt: skip
    assert described((tmp_path / "c.jpg.xmp").read_bytes(), "c") == "new"
    assert (tmp_path / "b.jpg.xmp_original").read_text() == edited
    # What an earlier run made needs no copy.
    assert sorted(path.name for path in tmp_path.glob("*_original")) == ["a.jpg.xmp_original", "b.jpg.xmp_original"]


def test_a_long_text_is_cut_for_those_who_have_it_read(tmp_path):
    text = "word " * 80
    content = packet(None, text.strip(), "a.xmp").decode()
    alternative = content.split("AltTextAccessibility")[1]
    assert text.strip() in content and alternative.count("word") == 50


def test_stems(tmp_path):
    paths = drawn(tmp_path, "a.jpg", "a.png")
    with pytest.raises(CollectionError, match="--xmp-shared"):
        captioned(paths, Outputs(xmp=True, xmp_name="stem"))
    captioned(paths, Outputs(xmp=True, xmp_name="stem", xmp_shared=True))
    assert [path.name for path in tmp_path.glob("*.xmp")] == ["a.xmp"]


@needs_exiftool
def test_embedded(tmp_path):
    paths = drawn(tmp_path, "a.jpg", "\u043a\u043e\u0442.png", "c d.webp", "-e.jpg", "lie.jpg", "mine.jpg")
    shutil.copy(paths[1], paths[4])  # a PNG by its content
    subprocess.run(["exiftool", "-q", "-overwrite_original", "-EXIF:ImageDescription=mine", paths[5]], check=True)
    pixels = {path: np.asarray(load_image(path)) for path in paths}
    times = {path: int(Path(path).stat().st_mtime) for path in paths}
    lie = Path(paths[4]).read_bytes()
    said = 'sks dog, ein Hund & "x" <y> \xe9'
    captioned(paths, Outputs(embed=True), lambda record: Outcome([said], [0.0], [1]), journal=tmp_path / ".blip2")
    found = {
        Path(row["SourceFile"]).name: row for row in told_by_exiftool("-use", "MWG", "-MWG:all", "-XMP:all", *paths)
    }
    for path in (*paths[:4], paths[5]):
        text = "mine" if path == paths[5] else said
        assert found[Path(path).name]["MWG:Description"] == text
        assert np.array_equal(np.asarray(load_image(path)), pixels[path])
        assert int(Path(path).stat().st_mtime) == times[path]
    assert found["a.jpg"]["XMP-iptcCore:AltTextAccessibility"] == said
    assert Path(paths[4]).read_bytes() == lie
    assert not [*tmp_path.glob("*_original"), *tmp_path.glob("*_exiftool_tmp")]
    # It has changed the files, and knows them again.
    before = Path(paths[0]).read_bytes()
    captioned(paths, Outputs(embed=True), lambda record: 1 / 0, journal=tmp_path / ".blip2")
    assert Path(paths[0]).read_bytes() == before


def test_without_exiftool(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(CollectionError, match="install"):
        captioned(drawn(tmp_path, "a.jpg"), Outputs(embed=True))
