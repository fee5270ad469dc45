"""The training text: public-domain books out of Debian packages."""

import re
import struct
import subprocess
import zlib
from pathlib import Path

PACKAGES = ["bible-kjv", "bible-kjv-text", "r-cran-janeaustenr"]


def download(folder):
    """Fetches and unpacks the packages below ``folder``; nothing is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder / "root"], check=True)
    return folder / "root"


def bible_chapters(root):
    """The King James Bible, one string per chapter, one verse per line."""
    program, data = root / "usr/bin/bible", root / "usr/lib"
    text = subprocess.run(
        [program, "-l1000000", "-p", data, "-f", "ge1:1-re22:21"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    chapters = {}
    for line in text.splitlines():
        match = re.match(r"(\w+?\d+):\d+ (.*)", line)
        if match:
            chapters.setdefault(match[1], []).append(match[2].strip())
    return ["\n".join(verses) for verses in chapters.values()]


def _r_strings(data):
    """The longest character vector in an R object serialised in XDR format (R Internals, section 1.8)."""
    best = []
    for match in re.finditer(rb"\x00\x00[\x00\x02]\x10", data):  # a STRSXP's flags, then its length
        at = match.end()
        (count,) = struct.unpack_from(">i", data, at)
        at += 4
        strings = []
        while len(strings) < count and at + 8 <= len(data):
            flags, size = struct.unpack_from(">Ii", data, at)
            if flags & 0xFF != 9 or size < 0:  # not a CHARSXP
                break
            strings.append(data[at + 8 : at + 8 + size].decode())
            at += 8 + size
        if len(strings) == count and count > len(best):
            best = strings
    return best


def novels(root):
    """Jane Austen's six novels: a list of lists of lines."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    at = 0
    while at < len(data):
        # Each record: the uncompressed length, four bytes, and a zlib stream.
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(data[at + 4 :]))
        at = len(data) - len(stream.unused_data)
        if len(lines) > 1000:
            yield lines


def novel_chapters(lines):
    """Chapters with the line breaks inside paragraphs undone."""
    text = "\n".join(lines)
    parts = re.split(r"\n+(?=(?:CHAPTER|Chapter) [\dIVXLC]+)", text)
    for part in parts[1:]:
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", part)]
        yield "\n\n".join(p.replace("_", "") for p in paragraphs if p)


def documents(root):
    """Two lists of documents by source, each in reading order."""
    return {
        "King James Bible": bible_chapters(root),
        "Jane Austen": [chapter for novel in novels(root) for chapter in novel_chapters(novel)],
    }


if __name__ == "__main__":
    import sys

    for source, texts in documents(Path(sys.argv[1])).items():
        print(source, len(texts), "documents", sum(map(len, texts)), "characters")
        print(texts[0][:300], "...\n")
