"""Faults in a small data set, and what is to come of each: `FAULTS`.

A fault is accepted (every image is finite and in [0, 1]) or refused in one
line that names the file or folder.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import os
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

import dataset
import utils
from tests.conftest import blobs

SIDE = 32  # pixels of the long side; a brain's other side has 28
EVERY = {"oasis": 8, "adni": 5, "hipmri": 5}  # so that a scan has 4 slices
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, and what is to come of it."""

    name: str
    layout: str
    make: Callable  # folder -> the path that a refusal must name
    refused: str | None = None  # regex of the refusal; None: to be accepted
    says: str = ""  # regex of what is printed if it is accepted
    lost: int = 0  # images that an accepted data set has fewer
    skips: bool = False  # whether `skip_bad` goes on without that file
    bomb: bool = False  # whether reading it would fill the memory
    home: str = "home"  # name of the folder above the data set


@functools.cache
def _simulated(layout):
    """Return {path inside: contents} of a small data set, 16 images."""
    found, every = {}, EVERY[layout]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        with contextlib.redirect_stderr(io.StringIO()):
            dataset.simulate(root, layout, 4, SIDE)
        for path in filter(Path.is_file, root.rglob("*")):
            number = re.search(r"_(\d+)\.(nii|jpeg)", path.name)
            if not number or int(number[1]) % every == every // 2:
                found[str(path.relative_to(root))] = path.read_bytes()
    return found


def write_good(root, layout):
    """Write the data set that every fault of a layout is made in."""
    for name, data in _simulated(layout).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def load(fault, root, skip_bad=False):
    """Return the slices of a data set and what loading them printed."""
    output, place = io.StringIO(), str(root.parent)
    settings = utils.DataSettings(
        dataset=fault.layout, data_dir=place, skip_bad=skip_bad
    )
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        return dataset.load(settings), output.getvalue()


def files(root, split="train"):
    """Return the files of a split, sorted."""
    return sorted(p for p in root.glob(f"*{split}/**/*") if p.is_file())


# ------------------------------------------------------------------ contents


def encode(image, kind, **options):
    """Return an array or a Pillow image as the bytes of a file."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(image, **options):
    return encode(image, "PNG", **options)


def jpeg(array, mode="L", **options):
    return encode(Image.fromarray(array).convert(mode), "JPEG", **options)


def nifti(array):
    return nibabel.Nifti1Image(array, np.eye(4)).to_bytes()


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def palette(colours, **options):
    image = Image.fromarray(GREY).convert("P")
    image.putpalette(bytes(np.ravel(colours).tolist()))
    return png(image, **options)


def chunk(kind, body):
    """Return a chunk of a PNG with its right checksum."""
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


GREY = blobs(1234, shape=(SIDE, 28))
RGB = np.dstack([GREY, GREY[::-1], GREY[:, ::-1]])
RGBA = np.dstack([GREY, GREY, GREY, GREY])
OPAQUE = np.dstack([GREY, GREY, GREY, np.full_like(GREY, 200)])
DEEP = np.arange(GREY.size, dtype=np.uint16).reshape(GREY.shape) * 73
PLANE = GREY.astype(np.int16)
REVERSED = [[255 - k] * 3 for k in range(256)]
COLOURED = [[k, 255 - k, k // 2] for k in range(256)]
FORMATS = ("GIF", "BMP", "WEBP", "TIFF")
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned to the right
LOSSLESS = bytes.fromhex(  # squares of 9, 90, 200 and 50
    "ffd8ffc3000b080008000801011100ffc4001c00000000090000000000000000000000000"
    "00102030405060708ffda0008010100010000710000f440000001e880000003d100000007"
    "a200117e0010d200000010d200000010d200000010d2001fffd9"
)
# ------------------------------------------ changes of the contents of a file


def first(share):
    return lambda data: data[: int(share * len(data))]


def always(data):
    return lambda _: data


def bit(at):
    """Turn over one bit, at a share of the length or after some bytes."""

    def change(data):
        place = int(at * len(data)) if isinstance(at, float) else at
        place = data.index(at) + len(at) if isinstance(at, bytes) else place
        data = bytearray(data)
        data[place] ^= 4
        return bytes(data)

    return change


def patch(offset, layout, *values):
    """Overwrite a field of the header of a NIfTI file."""

    def change(data):
        data = bytearray(data)
        struct.pack_into("<" + layout, data, offset, *values)
        return bytes(data)

    return change


def png_of_size(height, width):
    """Give a PNG a header of another size, with a right checksum."""
    size = struct.pack(">II", width, height)
    return lambda d: d[:8] + chunk(b"IHDR", size + d[24:29]) + d[33:]


def text_bomb(data):
    text = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(128 * MIB)))
    return data[:33] + text + data[33:]


def gzip_bomb(data):
    return gzip.compress(gzip.decompress(data) + bytes(128 * MIB))


def wrap(change):
    """Change the nibabel image in a .nii file."""
    return lambda d: change(nibabel.Nifti1Image.from_bytes(d)).to_bytes()


def voxels(change):
    return lambda d: nifti(
        change(np.asarray(nibabel.Nifti1Image.from_bytes(d).dataobj))
    )


def voxel(value):
    def change(array):
        array = array.astype(np.float32)
        array[3, 4] = value
        return array

    return voxels(change)


def flat_affine(data):
    """Put the whole plane on one line, by an sform that is in use."""
    data = patch(252, "2h", 0, 1)(data)
    return patch(280, "12f", 1, 1, 0, 0, *[0] * 8)(data)


def two_members(data):
    data = gzip.decompress(data)
    return gzip.compress(data[:999]) + gzip.compress(data[999:])


def endless_plane(data):
    """Claim the largest plane allowed in a small file."""
    data = patch(42, "2h", 4096, 4096)(gzip.decompress(data))
    return gzip.compress(patch(70, "2h", 64, 64)(data))


def inside(layout, name, change, refused=None, suffix=None, **options):
    """A fault in the contents of the first training file."""

    def make(root):
        path = files(root)[0]
        data = change(path.read_bytes())
        if suffix:
            path.unlink()
            path = path.with_name(path.name.split(".")[0] + suffix)
        path.write_bytes(data)
        return path

    return Fault(name, layout, make, refused, skips=bool(refused), **options)


def plain(name, change, refused=None, **options):
    """A fault in a file that is a .nii, not a .nii.gz."""
    unzipped = lambda data: change(gzip.decompress(data))  # noqa: E731
    return inside("hipmri", name, unzipped, refused, ".nii", **options)


# ---------------------------------------------------- changes of the folders


def tree(name, make, refused=None, named=None, layout="oasis", **options):
    """A fault in the folders; `named` is relative, None: the first file."""

    def made(root):
        path = files(root)[0] if named is None else (root / named).resolve()
        make(root)
        return path

    return Fault(name, layout, made, refused, **options)


def moved(*pairs):
    def make(root):
        for old, new in pairs:
            (root / old).rename(root / new)

    return make


def copied(name=None, split="test"):
    """Write the first image over the last of a split, or elsewhere, flipped."""

    def make(root):
        data = files(root)[0].read_bytes()
        path = root / name if name else files(root, split)[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels(data)[::-1]) if name else data)

    return make


def replaced(make):
    """Put something else where the first file was."""

    def replace(root):
        path = files(root)[0]
        path.unlink()
        make(path)

    return replace


def all_constant(root):
    for path in root.rglob("*.png"):
        path.write_bytes(png(0 * pixels(path.read_bytes()) + 9))


def linked_class(root):
    moved(("train/NC", "../elsewhere"))(root)
    (root / "train" / "NC").symlink_to(root.parent / "elsewhere")


def in_two_classes(root):
    path = files(root)[0]
    other = {"AD": "NC", "NC": "AD"}[path.parent.name]
    path.rename(path.parents[1] / other / path.name)


def resource_forks(root):
    for path in root.rglob("*.png"):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")


# ----------------------------------------------------------------- the table

oasis = functools.partial(inside, "oasis")
adni = functools.partial(inside, "adni")
gz = functools.partial(inside, "hipmri")
COLOUR = {"says": "1 files are in colour"}
NAMED = {"says": "1 files named otherwise"}
BOMB, SKIPS = {"bomb": True}, {"skips": True}
TRAIN, VALIDATE, TEST = (f"keras_png_slices_{s}" for s in dataset.SPLITS)
LINES = "one's\ntwo: \\x] [\x1b[31m"
BYTES = os.fsdecode(b"caf\xe9 \xf0")
CLEAR, NII, ODD = "transparency", "NIfTI file", "found not a file"
NAN, MUCH, TWICE = "1 voxels that are NaN", "beyond 1e.30", "in two splits"
# fmt: off
FAULTS = {fault.name: fault for fault in [
    oasis("zero bytes", first(0), "found no bytes"),
    oasis("half a PNG", first(0.5), "sound PNG"),
    oasis("PNG without IEND", lambda d: d[:-12], "sound PNG"),
    adni("half a JPEG", first(0.5), "sound PNG or JPEG"),
    adni("JPEG without EOI", lambda d: d[:-2], "sound PNG or JPEG"),
    oasis("bit of a PNG", bit(b"IDATx"), "sound PNG"),
    adni("bit of a JPEG", bit(0.75)),  # another picture: who can tell?
    adni("sound JPEGs", first(1)),
    oasis("junk after a PNG", lambda d: d + b"junk"),
    oasis("JPEG named .png", always(jpeg(GREY)), **NAMED),
    adni("PNG named .jpeg", always(png(GREY)), **NAMED),
    adni("lossless JPEG", always(LOSSLESS)),
    adni("turned by EXIF", always(jpeg(GREY.T.copy(), exif=TURNED)),
         says="1 files turned upright"),
    oasis("text", always(b"see the attached image\n"), "sound PNG"),
    oasis("NIfTI named .png", always(nifti(PLANE)), "PNG or JPEG"),
    oasis("16 bits", always(png(DEEP))),
    oasis("RGBA, one alpha", always(png(OPAQUE))),
    oasis("RGBA", always(png(RGBA)), CLEAR),
    oasis("LA", always(png(RGBA[..., 2:])), CLEAR),
    oasis("RGB, equal channels", always(png(RGBA[..., :3]))),
    oasis("RGB", always(png(RGB)), **COLOUR),
    adni("RGB JPEG", always(jpeg(RGB, "RGB")), **COLOUR),
    oasis("grey palette", always(palette(REVERSED))),
    oasis("palette", always(palette(COLOURED)), **COLOUR),
    oasis("clear palette", always(palette(REVERSED, transparency=90)), CLEAR),
    oasis("1 bit", always(png(GREY > 100))),
    adni("CMYK JPEG", always(jpeg(GREY, "CMYK")), "CMYK"),
    *(oasis(f"{kind} named .png", always(encode(GREY, kind)), "sound PNG")
      for kind in FORMATS),
    oasis("PNG of 8001x8000", png_of_size(8001, 8000), "8001x8000", **BOMB),
    oasis("PNG of 10^10 pixels", png_of_size(10**5, 10**5), "pixels", **BOMB),
    oasis("bomb in a PNG's text", text_bomb, "too large", **BOMB),
    oasis("PNG of no rows", png_of_size(0, 28), "PNG"),
    oasis("another size", always(png(GREY[3:, 9:])), says="29x19"),
    oasis("one pixel", always(png(GREY[:1, :1]))),
    oasis("constant image", always(png(np.zeros_like(GREY)))),
    gz("sound NIfTI", first(1)),
    gz("NIfTI of zero bytes", first(0), "found no bytes"),
    plain("half a .nii", first(0.5), NII),
    gz("half a .nii.gz", first(0.5), "ended before"),
    gz("bit of a gzip", bit(0.5), NII),
    gz("bit of a gzip's checksum", bit(-8), "CRC"),
    gz("gzip without trailer", lambda d: d[:-4], "ended before"),
    gz("junk after a gzip", lambda d: d + b"junk", "Not a gzipped file"),
    gz("gzip of two members", two_members),
    gz(".nii named .nii.gz", gzip.decompress, NII),
    gz("text named .nii.gz", always(b"see the image"), NII),
    gz("gzip bomb", gzip_bomb, **BOMB),
    gz("header of 4096x4096", endless_plane, "expected one plane", **BOMB),
    plain("junk after a .nii", lambda d: d + b"junk"),
    plain("gzip named .nii", gzip.compress, NII),
    plain("PNG named .nii", always(png(GREY)), NII),
    plain("NIfTI-2", wrap(nibabel.Nifti2Image.from_image)),
    plain("degenerate affine", flat_affine),
    plain("header of 32767 rows", patch(42, "h", 32767), NII, **BOMB),
    plain("negative axis", patch(42, "h", -SIDE), "found shape"),
    plain("axis of length 0", patch(42, "h", 0), "found shape"),
    plain("no axes", patch(40, "h", 0), "found shape"),
    plain("unknown data type", patch(70, "h", 999), "999"),
    plain("RGB24", patch(70, "h", 128), "expected real numbers"),
    plain("complex", voxels(lambda v: v.astype(np.complex64)), "complex64"),
    plain("vox_offset 0", patch(108, "f", 0), "vox_offset"),
    plain("vox_offset 1e6", patch(108, "f", 1e6), NII),
    plain("slope 0", patch(112, "f", 0)),
    plain("slope NaN", patch(112, "f", np.nan)),
    plain("slope infinite", patch(112, "f", np.inf), "infinite scl_slope"),
    plain("slope 1e38", patch(112, "f", 1e38), MUCH),
    plain("slope 1e5", patch(112, "f", 1e5), says="3 files show nothing"),
    plain("NaN voxel", voxel(np.nan), NAN),
    plain("infinite voxel", voxel(np.inf), NAN),
    plain("voxel of 3e38", voxel(3e38), MUCH),
    plain("voxels of 1e308", voxels(lambda v: (v % 3 - 1) * 1e308), MUCH),
    plain("voxel of 9e29", voxel(9e29)),
    plain("negative voxels", voxels(lambda v: -v)),
    plain("volume", voxels(lambda v: np.dstack([v, v])), "expected one plane"),
    plain("4-D of one plane", voxels(lambda v: v[:, :, None, None])),
    plain("plane of shape (1, H, W)", voxels(lambda v: v[None])),

    tree("no root", lambda r: shutil.rmtree(r.parent), "cannot list", ".."),
    tree("no splits", moved((TRAIN, "a"), (TEST, "b"), (VALIDATE, "c")),
         f"in folders {TRAIN}", ".."),
    tree("no test split", moved((TEST, "b")), "none for test.*ignored b", "."),
    tree("no validation split", lambda r: shutil.rmtree(r / VALIDATE), lost=4,
         says="validate 1 subjects, 4 images"),
    tree("near name of a split", moved((VALIDATE, "keras_png_slices_Val")),
         says="keras_png_slices_val is read as validate"),
    tree("images beside the splits", copied("extra/scans/1.png"),
         says="extra/scans: 1 files ignored: 1.png"),
    tree("class that is a link", linked_class, layout="adni", says="4 NC"),
    tree("two sets", lambda r: shutil.copytree(r, r.with_name("copy")),
         "found several data sets, expected one", ".."),
    tree("damaged marker", lambda r: (r / dataset.MARKER).write_text("{"),
         "expected what the simulator", dataset.MARKER),
    tree("subject twice", copied(f"{TEST}/case_001_slice_9.png"), TWICE, "."),
    tree("also as 1", copied(f"{TEST}/case_1_slice_9.png"), TWICE, "."),
    tree("scan twice", in_two_classes, "in two class folders", ".", "adni"),
    tree("bytes in two splits", copied(), "found the same bytes in", **SKIPS),
    tree("bytes twice", copied(split="train"), says="1 files repeat"),
    tree("loop", lambda r: (r / TRAIN / "loop").symlink_to(r / TRAIN),
         says="1 files ignored: loop"),
    tree("all constant", all_constant, "all 16 images are const"),
    tree("link to nothing", replaced(lambda p: p.symlink_to(p)),
         "found a link to nothing", **SKIPS),
    tree("pipe like an image", replaced(os.mkfifo), ODD, **SKIPS),
    # Nothing is mapped at the beginning of a process's memory.
    tree("failing disk", replaced(lambda p: p.symlink_to("/proc/self/mem")),
         "cannot read.*Input/output error", **SKIPS),
    tree("resource forks", resource_forks, says="8 files ignored"),
    oasis("letters of all kinds", first(1), home="données IRM, 脑 [x] %20"),
    oasis("name that is not UTF-8", first(1), home=BYTES),
    oasis("damaged under a line break", first(0), "no bytes", home=LINES),
    oasis("damaged, not UTF-8", first(0), "no bytes", home=BYTES),
]}
# fmt: on
