"""The bad-input corpus: faults in a small data set, and what comes of each.

    python tests/corpus.py

Makes one fault at a time in a simulated data set of 16 images, checks it and
reads it as train.py does, and prints how many faults were accepted (every
image read is finite and in [0, 1]) and how many refused (one line that names
the file or folder). Anything else has escaped: the exit code is then 1, as it
is if a fault is accepted that should be refused, or the other way round.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import gzip
import io
import os
import re
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import nibabel  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import dataset  # noqa: E402
import utils  # noqa: E402
from tests.conftest import blobs  # noqa: E402

REFUSALS = (utils.DataError, utils.FlagError, utils.ResourceError)
SUBJECTS = 4
SIDE = 32  # pixels of the long side; a brain's other side has 28
EVERY = {"oasis": 8, "adni": 5, "hipmri": 5}  # so that a scan has 4 slices
DOWNSAMPLING = 4  # pixels per latent, as of the recipes
MIB = 1 << 20


class Skipped(Exception):
    """The fault cannot be made here."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault, and what is to come of it.

    Args:
        section: of the table that is printed.
        name: what is wrong.
        layout: key of `dataset.LAYOUTS`.
        fault: function of a data set's folder that makes the fault and
            returns the path that a refusal must name.
        refused: regex of the refusal, None if it is to be accepted.
        says: regex of what is printed if it is accepted.
        lost: images that an accepted data set has fewer.
        skips: whether `skip_bad` goes on without the file that is named.
        later: whether the fault comes after the check, before the training.
        bomb: whether reading it would fill the memory.
        home: name of the folder above the data set.
    """

    section: str
    name: str
    layout: str
    fault: Callable
    refused: str | None = None
    says: str = ""
    lost: int = 0
    skips: bool = True
    later: bool = False
    bomb: bool = False
    home: str = "home"

    @property
    def expected(self):
        return "refused" if self.refused else "accepted"


@dataclasses.dataclass
class Outcome:
    """What came of a mutant.

    Args:
        verdict: "accepted", "refused", "escaped", or "not made" here.
        text: what was raised, "" if nothing.
        output: what was printed.
        images: how many were read.
        named: path that a refusal must name.
        growth: bytes by which the memory's peak grew, None if unknown.
        kept: index without the unfit files, None if they cannot be skipped.
    """

    verdict: str
    text: str = ""
    output: str = ""
    images: int = 0
    named: Path | str | None = None
    growth: int | None = None
    kept: object = None


# ------------------------------------------------------------ good data sets


@functools.cache
def _simulated(layout):
    """Return {path inside: contents} of a small data set."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        with contextlib.redirect_stderr(io.StringIO()):
            dataset.simulate(root, layout, SUBJECTS, SIDE)
        paths = sorted(p for p in root.rglob("*") if p.is_file())
        names = LAYOUT_NAMES[layout]
        number = {p: re.fullmatch(names, p.name) for p in paths}
        return {
            str(p.relative_to(root)): p.read_bytes()
            for p in paths
            if number[p] is None
            or int(number[p]["slice"]) % EVERY[layout] == EVERY[layout] // 2
        }


LAYOUT_NAMES = {
    name: layout.file_name for name, layout in dataset.LAYOUTS.items()
}


def write_good(root, layout):
    """Write the data set that every mutant of a layout starts from."""
    for name, data in _simulated(layout).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def files(root, split="train"):
    """Return the files of a split, sorted."""
    return sorted(p for p in root.glob(f"*{split}/**/*") if p.is_file())


# ------------------------------------------------------------- contents made


def encode(image, kind, **options):
    """Return an array or a Pillow image as the bytes of a file."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_bytes(image, **options):
    return encode(image, "PNG", **options)


def jpeg_bytes(array, mode="L", **options):
    return encode(Image.fromarray(array).convert(mode), "JPEG", **options)


def nifti_bytes(array, affine=None):
    affine = np.eye(4) if affine is None else affine
    return nibabel.Nifti1Image(array, affine).to_bytes()


def pixels(data):
    """Return what Pillow makes of the bytes of a picture."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def patched(data, offset, layout, *values):
    """Return bytes with a field of a NIfTI header overwritten."""
    data = bytearray(data)
    struct.pack_into("<" + layout, data, offset, *values)
    return bytes(data)


def flipped(data, at):
    """Return bytes with one bit turned over."""
    data = bytearray(data)
    data[at] ^= 4
    return bytes(data)


def png_chunk(kind, body):
    body = kind + body
    length, checksum = len(body) - 4, zlib.crc32(body)
    return struct.pack(">I", length) + body + struct.pack(">I", checksum)


def png_of_size(data, height, width):
    """Return a PNG whose header, with a right checksum, has another size."""
    header = struct.pack(">II", width, height) + data[24:29]
    return data[:8] + png_chunk(b"IHDR", header) + data[33:]


def jpeg_of_size(data, height, width):
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def deflated(head, zeros):
    """Return `head` and many zeros as a raw stream, 1 kB for each MiB."""
    stream = zlib.compressobj(9, wbits=-15)
    start = stream.compress(head) + stream.flush(zlib.Z_FULL_FLUSH)
    # A full flush forgets what was before, so a block may be repeated.
    block = stream.compress(bytes(MIB)) + stream.flush(zlib.Z_FULL_FLUSH)
    rest = stream.compress(bytes(zeros % MIB)) + stream.flush()
    return start + zeros // MIB * block + rest


def zlib_zeros(count):
    """Return a zlib stream of zeros with its right checksum."""
    adler = struct.pack(">I", count % 65521 << 16 | 1)
    return b"\x78\xda" + deflated(b"", count) + adler


def gzip_bomb(head, zeros):
    """Return a gzip stream of `head` and zeros with its right checksum."""
    checksum = zlib.crc32(head)
    for _ in range(zeros // MIB):
        checksum = zlib.crc32(bytes(MIB), checksum)
    checksum = zlib.crc32(bytes(zeros % MIB), checksum)
    end = struct.pack("<II", checksum, (len(head) + zeros) % 2**32)
    start = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    return start + deflated(head, zeros) + end


def png_bomb(height, width):
    """Return a valid PNG of black pixels, a thousandth of their number."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib_zeros(height * (width + 1)))
        + png_chunk(b"IEND", b"")
    )


GREY = blobs(1234, shape=(SIDE, 28))
RGB = np.dstack([GREY, GREY[::-1], GREY[:, ::-1]])
RGBA = np.dstack([GREY, GREY, GREY, GREY])
OPAQUE = np.dstack([GREY, GREY, GREY, np.full_like(GREY, 200)])
DEEP = np.arange(GREY.size, dtype=np.uint16).reshape(GREY.shape) * 73
PLANE = GREY.astype(np.int16)


def palette(colours):
    """Return a palette image: the indices of GREY, with these colours."""
    image = Image.fromarray(GREY).convert("P")
    image.putpalette(bytes(np.ravel(colours).tolist()))
    return image


REVERSED = [[255 - k] * 3 for k in range(256)]
COLOURED = [[k, 255 - k, k // 2] for k in range(256)]


# ---------------------------------------------------- faults in image files


def rewritten(change, suffix=None):
    """Return a fault: the first training file with other contents.

    Args:
        change: function of the bytes of the file that returns others.
        suffix: new end of its name, such as ".gif".
    """

    def fault(root):
        path = files(root)[0]
        data = change(path.read_bytes())
        if suffix:
            path.unlink()
            path = path.with_name(path.name.split(".")[0] + suffix)
        path.write_bytes(data)
        return path

    return fault


def without_end(data):
    assert data[-8:-4] == b"IEND"
    assert pixels(data[:-12]).shape == GREY.shape  # Pillow does not mind
    return data[:-12]


def flipped_jpeg(data):
    changed = flipped(data, len(data) * 3 // 4)
    # It is still a picture, another one: no reader could tell.
    assert (pixels(changed) != pixels(data)).any()
    return changed


def flipped_frame(data):
    return flipped(data, data.index(b"\xff\xc0") + 1)


def flipped_pixels(data):
    return flipped(data, data.index(b"IDAT") + 100)


def too_few_rows(data):
    return png_of_size(data, 2 * SIDE, 28)


def with_text_bomb(data):
    text = png_chunk(b"zTXt", b"note\0\0" + zlib_zeros(256 * MIB))
    return data[:33] + text + data[33:]


def real_bomb(data):
    bomb = png_bomb(20_000, 20_000)
    assert len(bomb) < MIB
    return bomb


def resized(shape):
    """Return a fault: the first training image has another size."""
    image = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    return rewritten(lambda data: png_bytes(image))


def all_resized(root):
    for path in [*files(root), *files(root, "validate"), *files(root, "test")]:
        image = np.pad(pixels(path.read_bytes()), ((0, 0), (1, 1)))
        path.write_bytes(png_bytes(image))
    return "--image-size"


def all_constant(root):
    for split in dataset.SPLITS:
        for path in files(root, split):
            path.write_bytes(png_bytes(np.full_like(GREY, 9)))
    return files(root)[0]


def oasis(name, change, refused=None, *, suffix=None, **options):
    """Return a mutant of the contents of one PNG."""
    fault = rewritten(change, suffix)
    return Mutant("image files", name, "oasis", fault, refused, **options)


def adni(name, change, refused=None, *, suffix=None, **options):
    """Return a mutant of the contents of one JPEG."""
    fault = rewritten(change, suffix)
    return Mutant("image files", name, "adni", fault, refused, **options)


FORMATS = ("GIF", "BMP", "WEBP", "TIFF")


def other_formats(root):
    for path, kind in zip(files(root), FORMATS, strict=False):
        path.unlink()
        path.with_suffix(f".{kind.lower()}").write_bytes(encode(GREY, kind))


IMAGE_FILES = [
    oasis("zero bytes", lambda data: b"", "found an empty file"),
    oasis("half a PNG", lambda data: data[: len(data) // 2], "truncated PNG"),
    oasis(
        "nine tenths of a PNG",
        lambda data: data[: len(data) * 9 // 10],
        "truncated PNG",
    ),
    oasis("PNG without IEND", without_end, "truncated PNG"),
    oasis("8 bytes of a PNG", lambda data: data[:8], "expected a PNG or JPEG"),
    adni("half a JPEG", lambda data: data[: len(data) // 2], "truncated JPEG"),
    adni(
        "19 twentieths of a JPEG",
        lambda data: data[: len(data) * 19 // 20],
        "truncated JPEG",
    ),
    adni("JPEG without EOI", lambda data: data[:-2], "truncated JPEG"),
    adni("20 bytes of a JPEG", lambda data: data[:20], "truncated JPEG"),
    oasis("flipped bit: PNG header", lambda d: flipped(d, 19), "damaged PNG"),
    oasis("flipped bit: PNG pixels", flipped_pixels, "damaged PNG"),
    adni("flipped bit: JPEG header", flipped_frame, "JPEG"),
    adni("flipped bit: JPEG pixels", flipped_jpeg),
    oasis("junk after a PNG", lambda data: data + b"junk"),
    oasis("JPEG named .png", lambda _: jpeg_bytes(GREY), says="1 files named"),
    adni("PNG named .jpeg", lambda _: png_bytes(GREY), says="1 files named"),
    oasis("text", lambda _: b"see the attached image\n", "b'see the "),
    oasis("NIfTI named .png", lambda _: nifti_bytes(PLANE), "PNG or JPEG"),
    oasis("16 bits", lambda _: png_bytes(DEEP)),
    oasis("RGBA, one alpha", lambda _: png_bytes(OPAQUE)),
    oasis("RGBA", lambda _: png_bytes(RGBA), "transparency"),
    oasis("LA, one alpha", lambda _: png_bytes(OPAQUE[..., 2:])),
    oasis("LA", lambda _: png_bytes(RGBA[..., 2:]), "transparency"),
    oasis("RGB, equal channels", lambda _: png_bytes(RGBA[..., :3])),
    oasis("RGB", lambda _: png_bytes(RGB), says="1 files are in colour"),
    adni(
        "RGB JPEG",
        lambda _: jpeg_bytes(RGB, "RGB"),
        says="1 files are in colour",
    ),
    oasis("palette of greys", lambda _: png_bytes(palette(REVERSED))),
    oasis(
        "palette of colours",
        lambda _: png_bytes(palette(COLOURED)),
        says="1 files are in colour",
    ),
    oasis(
        "palette with transparency",
        lambda _: png_bytes(palette(REVERSED), transparency=int(GREY[0, 0])),
        "transparency",
    ),
    oasis("1 bit", lambda _: png_bytes(GREY > 100)),
    adni("CMYK JPEG", lambda _: jpeg_bytes(GREY, "CMYK"), "CMYK"),
    Mutant(
        "image files",
        "GIF, BMP, WebP and TIFF",
        "oasis",
        other_formats,
        says=r"4 files ignored: .*\.gif, .*\.bmp, .*\.webp, .*\.tiff",
        lost=4,
    ),
    *(
        oasis(
            f"{kind} named .png",
            lambda _, kind=kind: encode(GREY, kind),
            "expected a PNG or JPEG",
        )
        for kind in FORMATS
    ),
    oasis("PNG bomb", real_bomb, "20000x20000 pixels", bomb=True),
    oasis("bomb in a PNG's text", with_text_bomb, bomb=True),
    oasis(
        "PNG header of 100000x100000",
        lambda data: png_of_size(data, 100_000, 100_000),
        "100000x100000 pixels",
        bomb=True,
    ),
    adni(
        "JPEG header of 65500x65500",
        lambda data: jpeg_of_size(data, 65_500, 65_500),
        "65500x65500 pixels",
        bomb=True,
    ),
    oasis("PNG header of more rows", too_few_rows, "PNG"),
    oasis("PNG header of no rows", lambda d: png_of_size(d, 0, 28), "PNG"),
    adni(
        "JPEG header of more rows",
        lambda data: jpeg_of_size(data, 4 * SIDE, 28),  # no reader can tell
    ),
    Mutant("image files", "another size", "oasis", resized((40, 20))),
    Mutant("image files", "one pixel", "oasis", resized((1, 1))),
    Mutant(
        "image files",
        "sizes that do not divide",
        "oasis",
        all_resized,
        "32x30 is not a multiple of 4; use 32x28 or 32x32",
        skips=False,
    ),
    oasis("constant image", lambda _: png_bytes(np.zeros_like(GREY))),
    Mutant(
        "image files",
        "all constant",
        "oasis",
        all_constant,
        "all 16 images are constant",
        skips=False,
    ),
]

# ---------------------------------------------------------- faults in NIfTI


def hipmri(name, change, refused=None, **options):
    """Return a mutant of the contents of one .nii.gz file."""
    fault = rewritten(change)
    return Mutant("NIfTI", name, "hipmri", fault, refused, **options)


def plain(name, change, refused=None, **options):
    """Return a mutant of the contents of one .nii file."""
    fault = rewritten(lambda data: change(gzip.decompress(data)), ".nii")
    return Mutant("NIfTI", name, "hipmri", fault, refused, **options)


def field(name, offset, layout, value, refused=None, **options):
    """Return a mutant of one field of the header of a .nii file."""
    return plain(
        name,
        lambda data: patched(data, offset, layout, value),
        refused,
        **options,
    )


def array(name, make, refused=None, **options):
    """Return a mutant of the voxels of a file: function of the good ones."""

    def change(data):
        image = nibabel.Nifti1Image.from_bytes(data)
        return nifti_bytes(make(np.asarray(image.dataobj)))

    return plain(name, change, refused, **options)


def with_voxel(value):
    def make(voxels):
        voxels = voxels.astype(np.float32)
        voxels[3, 4] = value
        return voxels

    return make


def nibabel_loads(data, good):
    """Return bytes of a .nii.gz after proof that nibabel sees no fault."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.nii.gz"
        path.write_bytes(data)
        read = np.asarray(nibabel.load(path).dataobj)
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(good))
    assert (read == np.asarray(image.dataobj)).all()
    return data


def flipped_checksum(data):
    return nibabel_loads(flipped(data, -8), data)


def no_trailer(data):
    return nibabel_loads(data[:-4], data)


def trailing_junk(data):
    return nibabel_loads(data + b"junk", data)


def of_header_only(data):
    """A 32767^3 volume: the header's own axes, no voxel behind it."""
    return patched(data, 40, "4h", 3, 32767, 32767, 32767)


def expands(data):
    return gzip_bomb(gzip.decompress(data), 512 * MIB)


def endless_plane(data):
    """The largest plane allowed in a small file that does not hold it."""
    head = patched(gzip.decompress(data), 42, "2h", 4096, 4096)
    return gzip.compress(patched(head, 70, "2h", 64, 64))


def big_endian(data):
    image = nibabel.Nifti1Image.from_bytes(data)
    header = image.header.as_byteswapped(">")
    data = nibabel.Nifti1Image(image.dataobj, None, header).to_bytes()
    assert data[:4] == b"\0\0\1\x5c"
    return data


def flat_affine(data):
    """An sform that puts the whole plane on one line, in use."""
    data = patched(data, 252, "2h", 0, 1)
    return patched(data, 280, "12f", 1, 1, 0, 0, *[0] * 8)


def nifti_2(data):
    image = nibabel.Nifti1Image.from_bytes(data)
    return nibabel.Nifti2Image(image.dataobj, image.affine).to_bytes()


NIFTI = [
    hipmri("zero bytes", lambda data: b"", "found an empty file"),
    plain("half a .nii", lambda data: data[: len(data) // 2], "truncated"),
    hipmri("half a .nii.gz", lambda d: d[: len(d) // 2], "truncated"),
    hipmri("20 bytes of a .nii.gz", lambda data: data[:20], "NIfTI-1"),
    hipmri("flipped bit: gzip data", lambda d: flipped(d, len(d) // 2), "gzip"),
    hipmri("flipped bit: gzip checksum", flipped_checksum, "data check"),
    hipmri("gzip without its trailer", no_trailer, "no end of the gzip"),
    hipmri("junk after the gzip", trailing_junk, "data after the end"),
    plain("junk after a .nii", lambda data: data + b"junk"),
    hipmri(".nii named .nii.gz", gzip.decompress, says="1 files named"),
    plain("gzip named .nii", gzip.compress, says="1 files named"),
    hipmri("text named .nii.gz", lambda _: b"see the image", "NIfTI-1"),
    plain("PNG named .nii", lambda _: png_bytes(GREY), "NIfTI-1"),
    plain("half a header", lambda data: data[:174], "NIfTI-1"),
    plain("NIfTI-2", nifti_2, "NIfTI-1"),
    field("header size 349", 0, "i", 349, "NIfTI-1"),
    field("negative axis", 42, "h", -SIDE, "axes"),
    field("axis of length 0", 42, "h", 0, "axes"),
    field("no axes", 40, "h", 0, "0 axes"),
    field("9 axes", 40, "h", 9, "9 axes"),
    field("unknown data type", 70, "h", 999, "data type 999"),
    field("RGB24", 70, "h", 128, "data type 128"),
    array("complex", lambda v: v.astype(np.complex64), "data type 32"),
    field("vox_offset 0", 108, "f", 0, "vox_offset 0"),
    field("vox_offset 1e6", 108, "f", 1e6, "truncated"),
    field("vox_offset NaN", 108, "f", np.nan, "vox_offset nan"),
    field("slope 0", 112, "f", 0),
    field("slope NaN", 112, "f", np.nan),
    field("slope infinite", 112, "f", np.inf, "scl_slope inf"),
    field("slope 1e38", 112, "f", 1e38, "beyond 1e.30"),
    field("slope 1e5", 112, "f", 1e5, says="3 files show nothing"),
    field("intercept NaN", 116, "f", np.nan, "scl_inter nan"),
    array("NaN voxel", with_voxel(np.nan), "1 voxels that are NaN"),
    array("infinite voxel", with_voxel(np.inf), "1 voxels that are NaN"),
    array("voxel of 3e38", with_voxel(3e38), "beyond 1e.30"),
    array("voxels of +-1e308", lambda v: (v % 3 - 1) * 1e308, "beyond 1e.30"),
    array("voxel of 9e29", with_voxel(9e29)),
    array("negative voxels", lambda v: -v),
    array("volume", lambda v: np.dstack([v] * 3), r"shape \(32, 1\d, 3\)"),
    array("4-D", lambda v: np.stack([v] * 2, -1)[:, :, None], "one plane"),
    array("4-D of one plane", lambda v: v[:, :, None, None]),
    plain("big-endian", big_endian),
    plain("degenerate affine", flat_affine),
    plain("header of 32767^3", of_header_only, "32767", bomb=True),
    hipmri("gzip bomb", expands, "no end of the gzip", bomb=True),
    hipmri("header of 4096x4096", endless_plane, "truncated", bomb=True),
]

# --------------------------------------------------- faults in the data set


def layout(name, refused=None, on="oasis", *, skips=False, **options):
    """Make a mutant of a function of the data set's folder."""

    def register(fault):
        section = "while training" if options.get("later") else "data set"
        LAYOUT.append(
            Mutant(section, name, on, fault, refused, skips=skips, **options)
        )
        return fault

    return register


LAYOUT = []
NOT_UTF8 = os.fsdecode(b"caf\xe9 \xf0")
TWO_LINES = "one's\ntwo: \\x] [\x1b[31m"


def split_folder(root, split):
    return root / dataset.LAYOUTS["oasis"].folders[split]


@layout("no root", "found nothing there, expected a folder")
def no_root(root):
    shutil.rmtree(root.parent)
    return root.parent


@layout("root without splits", "looked for folders keras_png_slices_train")
def no_splits(root):
    for split in dataset.SPLITS:
        split_folder(root, split).rename(root / f"my_{split}")
    return root.parent


@layout("no test split", "looked for .*keras_png_slices_test, found keras")
def no_test_split(root):
    shutil.rmtree(split_folder(root, "test"))
    return root


@layout("no validation split", lost=4, says="validate 1 subjects, 4 images")
def no_validation_split(root):
    shutil.rmtree(split_folder(root, "validate"))


@layout("empty split", "no slices; looked for files like case_001_slice_0")
def empty_split(root):
    for path in files(root, "validate"):
        path.unlink()
    return split_folder(root, "validate")


@layout("two data sets", "found several data sets, expected one")
def two_data_sets(root):
    shutil.copytree(root, root.with_name("copy"))
    return root


@layout("damaged marker of a simulation", "found a damaged file")
def damaged_marker(root):
    path = root / dataset.MARKER
    path.write_text("{")
    return path


@layout("one training image", lost=7, says="a single training image")
def one_training_image(root):
    for path in files(root)[1:]:
        path.unlink()


@layout("subject in two splits", "1 subjects are in two splits")
def subject_in_two_splits(root):
    path = files(root)[0]
    other = re.sub("slice_.*", "slice_99.nii.png", path.name)
    image = pixels(path.read_bytes())[::-1]
    (split_folder(root, "test") / other).write_bytes(png_bytes(image))
    return root


@layout("scan in two class folders", "in two class folders", "adni")
def scan_in_two_class_folders(root):
    path = files(root)[0]
    other = {"AD": "NC", "NC": "AD"}[path.parent.name]
    path.rename(path.parents[1] / other / path.name)
    return root


@layout("same bytes in two splits", "found the same bytes in", skips=True)
def same_bytes_in_two_splits(root):
    shutil.copy(files(root)[0], files(root, "test")[0])
    return files(root)[0]


@layout("repeats within a split", says="1 files repeat others")
def repeats_within_a_split(root):
    shutil.copy(files(root)[0], files(root)[1])


@layout("loop of links", says="1 files ignored: loop")
def loop_of_links(root):
    folder = split_folder(root, "train")
    (folder / "loop").symlink_to(folder, target_is_directory=True)


@layout("link to nothing", "found not a file", skips=True)
def link_to_nothing(root):
    path = files(root)[0]
    path.unlink()
    path.symlink_to(path)
    return path


@layout("unreadable file", "cannot read.*Permission denied", skips=True)
def unreadable_file(root):
    if os.geteuid() == 0:
        raise Skipped("root may read everything")
    path = files(root)[0]
    path.chmod(0)
    return path


@layout("unreadable folder", "cannot list the folder")
def unreadable_folder(root):
    if os.geteuid() == 0:
        raise Skipped("root may read everything")
    path = split_folder(root, "test")
    path.chmod(0)
    return path


def failing(path):
    """Make a file fail while it is read, as on a broken disk."""
    memory = Path("/proc/self/mem")  # nothing is mapped at its beginning
    try:
        memory.read_bytes()
    except OSError as error:
        if error.errno == errno.EIO:
            path.unlink()
            path.symlink_to(memory)
            return path
    raise Skipped("there is no file here that cannot be read")


@layout("failing disk", "cannot read.*Input/output error", skips=True)
def failing_disk(root):
    return failing(files(root)[0])


@layout("folder named like an image", "found not a file", skips=True)
def folder_named_like_an_image(root):
    path = files(root)[0]
    path.unlink()
    path.mkdir()
    return path


@layout("pipe named like an image", "found not a file", skips=True)
def pipe_named_like_an_image(root):
    path = files(root)[0]
    path.unlink()
    os.mkfifo(path)
    return path


@layout("resource forks", says="16 files ignored")
def resource_forks(root):
    for split in dataset.SPLITS:
        for path in files(root, split):
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")


@layout("spaces and letters of all kinds", home="données IRM, 脑 [x] %20 #1")
@layout("name that is not UTF-8", home=NOT_UTF8)
def nothing(root):
    """The name of the folder is all."""


@layout("damaged file under a line break", "empty", home=TWO_LINES, skips=True)
@layout("damaged file, name not UTF-8", "empty", home=NOT_UTF8, skips=True)
def damaged_file(root):
    path = files(root)[0]
    path.write_bytes(b"")
    return path


@layout("file that vanishes", "No such file", later=True)
@layout(
    "file that vanishes, name not UTF-8",
    "No such file",
    home=NOT_UTF8,
    later=True,
)
@layout(
    "file that vanishes under a line break",
    "No such file",
    home=TWO_LINES,
    later=True,
)
def file_that_vanishes(root):
    path = files(root)[0]
    path.unlink()
    return path


@layout("data set that vanishes", "No such file", later=True)
def data_set_that_vanishes(root):
    shutil.rmtree(root)
    return root  # any file of it may be the first that is missed


@layout("file that becomes another", "file changed", later=True)
@layout(
    "file that becomes another, name not UTF-8",
    "file changed",
    home=NOT_UTF8,
    later=True,
)
@layout(
    "file that becomes another under a line break",
    "file changed",
    home=TWO_LINES,
    later=True,
)
def file_that_becomes_another(root):
    shutil.copy(files(root)[1], files(root)[0])
    return files(root)[0]


@layout("file that is cut", "file changed", later=True)
def file_that_is_cut(root):
    path = files(root)[0]
    path.write_bytes(path.read_bytes()[:300])
    return path


@layout("file that becomes a bomb", "file changed", later=True, bomb=True)
def file_that_becomes_a_bomb(root):
    path = files(root)[0]
    path.write_bytes(real_bomb(None))
    return path


@layout("file that becomes a folder", "Is a directory", later=True)
def file_that_becomes_a_folder(root):
    return folder_named_like_an_image(root)


@layout("disk that fails", "Input/output error", later=True)
def disk_that_fails(root):
    return failing(files(root)[0])


@layout("file that becomes unreadable", "Permission denied", later=True)
def file_that_becomes_unreadable(root):
    return unreadable_file(root)


MUTANTS = {f"{m.section}: {m.name}": m for m in [*IMAGE_FILES, *NIFTI, *LAYOUT]}

# ------------------------------------------------------------------ judgement


def judge(mutant, folder):
    """Make a fault in a good data set in a new folder; return its `Outcome`."""
    try:
        root = Path(folder) / mutant.home / "data"
        try:
            write_good(root, mutant.layout)
        except OSError as error:
            raise Skipped(f"no such folder can be made: {error}") from error
        return _judge(mutant, root)
    except Skipped as reason:
        return Outcome("not made", str(reason))


def _judge(mutant, root):
    if mutant.later:
        named, later = None, mutant.fault
    else:
        named, later = mutant.fault(root), None
    output, images, error, kept = io.StringIO(), (), None, None
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        peak_growth() as growth,
    ):
        try:
            index = dataset.load_index(root.parent, mutant.layout)
            named = later(root) if later else named
            images = read(index)
        except Skipped:
            raise
        except Exception as caught:
            error = caught
    if not error:
        sound = np.isfinite(images).all() and len(images) == len(index)
        sound = sound and 0 <= images.min() and images.max() <= 1
        verdict = "accepted" if sound else "escaped"
    else:
        verdict = "refused" if is_refusal(error, named) else "escaped"
        if verdict == "refused" and mutant.skips and not later:
            with (
                contextlib.redirect_stdout(output),
                contextlib.redirect_stderr(output),
            ):
                kept = dataset.load_index(root.parent, mutant.layout, True)
    return Outcome(
        verdict,
        f"{type(error).__name__}: {error}" if error else "",
        output.getvalue(),
        len(images),
        named,
        growth[0],
        kept,
    )


def read(index):
    """Return every image of an index, as train.py reads them."""
    size = dataset.native_size(index)
    utils.check_image_size(size, DOWNSAMPLING)
    with dataset.naming_files():
        images = dataset.make_dataset(index, size, 8)
        return np.concatenate([batch.numpy() for batch in images])


def is_refusal(error, named):
    """Whether an error is one line, fit for a terminal, with the name."""
    text = str(error)
    if type(error) not in REFUSALS or named is None:
        return False
    return dataset._show(named) in text and text.isprintable()


@contextlib.contextmanager
def peak_growth():
    """Yield a list that holds in the end by how much memory grew at most."""

    def memory(key):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{key}:\s+(\d+)", status)[1])

    growth, before = [], None
    with contextlib.suppress(OSError, TypeError):  # elsewhere than on Linux
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = memory("VmRSS")
    yield growth
    growth.append(before and max(0, memory("VmHWM") - before))


def table(outcomes):
    """Return the totals by section of a dict of outcomes, as text."""
    counts = {m.section: collections.Counter() for m in MUTANTS.values()}
    for name, outcome in outcomes.items():
        for column in ("mutants", outcome.verdict):
            counts[MUTANTS[name].section][column] += 1
        counts[MUTANTS[name].section]["left out"] += outcome.kept is not None
    counts["all"] = sum(counts.values(), collections.Counter())
    columns = "mutants accepted refused escaped not-made left-out".split()
    lines = [f"{'':15}" + "".join(f"{c:>10}" for c in columns)]
    for section, count in counts.items():
        numbers = [count[column.replace("-", " ")] for column in columns]
        lines.append(f"{section:15}" + "".join(f"{n:10}" for n in numbers))
    return "\n".join(lines)


# --------------------------------------------------------------- command line


def main():
    """Judge every mutant; return the exit code."""
    started, outcomes = time.process_time(), {}
    for name, mutant in MUTANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            outcomes[name] = judge(mutant, folder)
    print(table(outcomes))
    most = max(o.growth or 0 for n, o in outcomes.items() if MUTANTS[n].bomb)
    print(
        "left out: of the refused, those that --skip-bad goes on without\n"
        f"{time.process_time() - started:.0f} s of processor time; no bomb "
        f"took more than {most / MIB:.0f} MiB"
    )
    wrong = 0
    for name, outcome in outcomes.items():
        if outcome.verdict != MUTANTS[name].expected:
            print(f"{outcome.verdict}: {name}: {outcome.text}")
            wrong += outcome.verdict != "not made"
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
