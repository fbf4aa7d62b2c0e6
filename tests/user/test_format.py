"""Token files: what is written is read, byte for byte as documented, and nothing else is taken for one."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
import zlib

import pytest
import torch

from flowmo import FlowMo, model_config
from flowmo.data.tokens import TokenLayout, layout_of
from flowmo.format import HEADER, NUMBERS, LatentLayout, TokenFile, TokenFileError, file_layout
from flowmo.tiles import TileGrid

LO = TokenLayout(512, 9, 18, tokenizer="ab" * 32)
HI = TokenLayout(1024, 14, 56, tokenizer="cd" * 32)
SMALL = TokenLayout(2, 9, 18, tokenizer="ef" * 32)


def codes_for(grid: TileGrid, layout: TokenLayout, seed: int = 0) -> torch.Tensor:
    shape = grid.count, layout.tokens * layout.bits // layout.channels, layout.channels
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


def small_file(width: int = 6, height: int = 4) -> TokenFile:
    grid = TileGrid(height, width, 4, 1)
    return TokenFile.pack(grid, codes_for(grid, SMALL), SMALL)


@pytest.mark.parametrize(("layout", "payload"), [(LO, 576), (HI, 1792)], ids=["lo", "hi"])
@pytest.mark.parametrize(("width", "height", "tiles"), [(256, 256, 1), (640, 427, 6), (512, 512, 9), (100, 300, 2)])
def test_round_trip(tmp_path, layout, payload, width, height, tiles):
    grid = TileGrid(height, width, 256, 64)
    codes = codes_for(grid, layout)
    file = TokenFile.pack(grid, codes, layout)
    assert len(file.payload) == tiles * payload
    path = file.write(tmp_path / "new" / "photo.flowmo")
    assert path.stat().st_size == tiles * payload + 68
    back = TokenFile.read(path)
    assert back == file and back.grid == grid and back.tokenizer == layout.tokenizer
    assert torch.equal(back.codes(layout).float(), codes)


def test_round_trip_of_many_tiles():
    """More than are packed at a time."""
    grid = TileGrid(40, 52, 4, 0)
    codes = codes_for(grid, SMALL)
    assert len(codes) == 130 and torch.equal(TokenFile.pack(grid, codes, SMALL).codes(SMALL).float(), codes)


def test_bytes_are_those_of_the_description():
    file = small_file()
    codes = codes_for(file.grid, SMALL)
    payload = b""
    for tile in codes.tolist():
        stream = [int(tile[0][k * 2 + f] > 0) for f in range(2) for k in range(9)]
        stream += [0] * 6
        payload += bytes(sum(bit << j for j, bit in enumerate(stream[i : i + 8])) for i in range(0, 24, 8))
    body = b"\x89FlowMo\n" + struct.pack("<BBHIIIII", 1, 0, 9, 6, 4, 4, 1, 2) + b"\xef" * 32 + payload
    assert len(codes) == 2 and file.to_bytes() == body + struct.pack("<I", zlib.crc32(body))


def test_every_flipped_bit_and_every_cut_is_noticed():
    data = small_file().to_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TokenFileError):
            TokenFile.from_bytes(bytes(damaged))
    for length in range(len(data)):
        with pytest.raises(TokenFileError, match="no FlowMo token file" if length == 0 else "cut short"):
            TokenFile.from_bytes(data[:length])
    with pytest.raises(TokenFileError, match="too long"):
        TokenFile.from_bytes(data + b"\0")


def sealed(head: bytes, payload: bytes) -> bytes:
    return head + payload + struct.pack("<I", zlib.crc32(head + payload))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"magic": b"\x89PNG\r\n\x1a\n"}, "no FlowMo token file"),
        ({"version": 2}, "format version 2"),
        ({"kind": 2}, "damaged or hostile"),
        ({"kind": 2, "bits": 16}, "damaged or hostile"),
        ({"kind": 1}, "damaged or hostile"),  # numbers of 9 bits
        ({"width": 0}, "damaged or hostile"),
        ({"width": 2**32 - 1, "height": 2**32 - 1}, "damaged or hostile"),
        ({"width": 65535, "height": 65535}, "damaged or hostile"),
        ({"width": 16384, "height": 16384, "tile": 1, "overlap": 0}, "cut short"),
        ({"tile": 0, "overlap": 0}, "damaged or hostile"),
        ({"overlap": 3}, "damaged or hostile"),
        ({"tokens": 0}, "damaged or hostile"),
        ({"tokens": 2**32 - 1}, "damaged or hostile"),
        ({"bits": 0}, "damaged or hostile"),
        ({"bits": 33}, "damaged or hostile"),
    ],
)  # fmt: skip
def test_hostile_headers_with_good_checksums(tmp_path, change, words):
    file = small_file()
    fields = dict(magic=b"\x89FlowMo\n", version=1, kind=0, bits=9, width=6, height=4, tile=4, overlap=1, tokens=2)
    head = HEADER.pack(*{**fields, **change}.values(), b"\0" * 32)
    (tmp_path / "hostile.flowmo").write_bytes(sealed(head, file.payload))
    tracemalloc.start()
    try:
        with pytest.raises(TokenFileError, match=words) as caught:
            TokenFile.read(tmp_path / "hostile.flowmo")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "hostile.flowmo" in str(caught.value) and "\n" not in str(caught.value)
    assert peak < 2**20  # of the gigabytes that some of these speak of


def test_a_huge_file_is_not_read_for_its_header(tmp_path):
    path = tmp_path / "sparse.flowmo"
    with open(path, "wb") as file:
        file.write(small_file().to_bytes())
        file.truncate(2**33)
    tracemalloc.start()
    try:
        with pytest.raises(TokenFileError, match="too long"):
            TokenFile.read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_fuzz_100000_files():
    """Random bytes, mutations, and mutations whose checksum is right again: a file or TokenFileError, nothing else."""
    rng = random.Random(0)
    data = small_file().to_bytes()
    accepted = refused = 0
    for i in range(100_000):
        kind = i % 4
        if kind == 0:  # random bytes, half of them behind a good magic
            fuzzed = data[: 8 * (i & 4 == 0)] + rng.randbytes(rng.randrange(160))
        else:
            changed = bytearray(data)
            for _ in range(rng.randrange(1, 4)):
                place = rng.randrange(len(changed))
                changed[place] = rng.choice((0, 1, 0xFF, rng.randrange(256)))
            if kind == 2:  # cut, or with a part of it once more
                a, b = sorted((rng.randrange(len(changed)), rng.randrange(len(changed))))
                changed[a:b] = changed[a:b] * rng.randrange(3)
            if kind == 3:
                changed[-4:] = struct.pack("<I", zlib.crc32(changed[:-4]))
            fuzzed = bytes(changed)
        try:
            file = TokenFile.from_bytes(fuzzed)
        except TokenFileError:
            continue
        accepted += 1
        assert len(file.payload) == len(fuzzed) - 68 == file.grid.count * file.tile_bytes
        assert file.to_bytes() == fuzzed
        if accepted % 97 == 0:
            layout = TokenLayout(file.tokens, file.bits, file.bits)  # the channels are the model's, not the file's
            codes = file.codes(layout)
            assert codes.shape == (file.grid.count, file.tokens, file.bits) and bool((codes.abs() == 1).all())
            refused += not fsq_codes_of(file)
    assert accepted > 1000 and refused > 10  # the checksum did not hide the rest from the test


def fsq_codes_of(file: TokenFile) -> bool:
    """Whether the file's tokens, read as those of two levels of 3, lie in their vocabulary."""
    try:
        codes = file.codes(TokenLayout(file.tokens, file.bits, 2, levels=(3, 3)))
    except TokenFileError as error:
        assert "expected values in [0, 9)" in str(error)
        return False
    assert bool((codes.abs() <= 1).all())
    return True


FSQ = TokenLayout(32, 10, 8, tokenizer="12" * 32, levels=(8, 5, 5, 5))


def test_round_trip_of_fsq(tmp_path):
    grid = TileGrid(427, 640, 256, 64)
    tokens = torch.randint(0, FSQ.vocabulary, (grid.count, 32), generator=torch.Generator().manual_seed(0))
    codes = FSQ.decode(tokens)
    file = TokenFile.pack(grid, codes.bfloat16(), FSQ)  # levels are told apart after rounding, too
    assert len(file.payload) == grid.count * 40
    back = TokenFile.read(file.write(tmp_path / "photo.flowmo"))
    assert torch.equal(back.codes(FSQ), codes) and back == file
    beyond = TokenFile(**{**vars(file), "payload": b"\xff" * len(file.payload)})
    with pytest.raises(TokenFileError, match=r"photo: damaged or hostile, tokens: expected values in \[0, 1000\)"):
        beyond.codes(FSQ, "photo")


def test_round_trip_of_real_numbers(tmp_path):
    grid = TileGrid(40, 32, 32, 8)
    layout = LatentLayout(16 * 6, 16, 6, tokenizer="34" * 32)
    codes = torch.randn(grid.count, 16, 6, generator=torch.Generator().manual_seed(0))
    codes[0, 0, :3] = torch.tensor([0.0, -0.0, -65504.0])
    file = TokenFile.pack(grid, codes, layout)
    # byte for byte the documented numbers: little-endian half precision, latent token by latent token
    assert file.payload == codes.numpy().astype("<f2").tobytes() and file.kind == NUMBERS
    data = file.to_bytes()
    assert data[8:12] == b"\1\1\x10\0"
    back = TokenFile.read(file.write(tmp_path / "photo.flowmo"))
    assert back == file and torch.equal(back.codes(layout), codes.half().float())
    with pytest.raises(ValueError, match="not all finite in half precision"):
        TokenFile.pack(grid, codes * 2, layout)
    for bad in (b"\0\x7c", b"\0\xfc", b"\1\x7e"):  # infinities and not a number
        hostile = TokenFile(**{**vars(file), "payload": bad + file.payload[2:]})
        with pytest.raises(TokenFileError, match="photo: damaged or hostile, its numbers are not all finite"):
            hostile.codes(layout, "photo")


def test_fuzzed_files_take_bounded_memory():
    rng = random.Random(1)
    data = bytearray(small_file().to_bytes())
    tracemalloc.start()
    try:
        for _ in range(3000):
            changed = data[:]
            changed[8:32] = rng.randbytes(24)
            changed[8:10] = b"\1\0"
            changed[-4:] = struct.pack("<I", zlib.crc32(changed[:-4]))
            with pytest.raises(TokenFileError):
                TokenFile.from_bytes(bytes(changed))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_file_has_the_rights_that_the_user_gives_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        path = small_file().write(tmp_path / "photo.flowmo")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TokenFile.read(tmp_path / "nowhere.flowmo")
    with pytest.raises(TokenFileError, match="not a regular file"):
        TokenFile.read(tmp_path)
    os.mkfifo(tmp_path / "pipe.flowmo")
    with pytest.raises(TokenFileError, match="not a regular file"):
        TokenFile.read(tmp_path / "pipe.flowmo")
    (tmp_path / "empty.flowmo").touch()
    with pytest.raises(TokenFileError, match="no FlowMo token file"):
        TokenFile.read(tmp_path / "empty.flowmo")


def test_pictures_beyond_the_format_are_refused():
    with pytest.raises(ValueError, match="scale it down"):
        grid = TileGrid(2, 70_000, 70_000, 0)
        TokenFile.pack(grid, codes_for(grid, SMALL), SMALL)
    with pytest.raises(ValueError, match="scale it down"):  # too many pixels within sides that are allowed
        grid = TileGrid(65_535, 65_535, 65_535, 0)
        TokenFile.pack(grid, codes_for(grid, SMALL), SMALL)
    with pytest.raises(ValueError, match="expected those of 2 tiles"):
        TokenFile.pack(TileGrid(4, 6, 4, 1), codes_for(TileGrid(4, 4, 4, 1), SMALL), SMALL)
    with pytest.raises(ValueError, match="fingerprint"):
        TokenFile.pack(TileGrid(4, 4, 4, 1), codes_for(TileGrid(4, 4, 4, 1), SMALL), TokenLayout(2, 9, 18))


def test_files_of_another_model_are_refused(tiny):
    layout = layout_of(tiny)
    grid = TileGrid(32, 40, 32, 8)
    file = TokenFile.pack(grid, codes_for(grid, layout), layout)
    file.check(tiny, layout)
    for name, other in {
        "tiles of 16": TokenFile.pack(TileGrid(16, 16, 16, 4), codes_for(TileGrid(16, 16, 16, 4), layout), layout),
        "2 tokens a tile": TokenFile.pack(grid, codes_for(grid, SMALL), SMALL),
        "tokens of 14 bits": TokenFile.pack(grid, codes_for(grid, HI), TokenLayout(32, 14, 56, tokenizer="cd" * 32)),
    }.items():
        with pytest.raises(TokenFileError, match=name):
            other.check(tiny, layout)
    foreign = TokenFile(**{**vars(file), "tokenizer": "00" * 32})
    with pytest.raises(TokenFileError, match="made by tokenizer 000000000000"):
        foreign.check(tiny, layout, "photo.flowmo")
    foreign.check(tiny, layout, any_tokenizer=True)
    alike = TokenFile(**{**vars(file), "tokenizer": layout.tokenizer[:-1] + "01"[layout.tokenizer[-1] == "0"]})
    with pytest.raises(TokenFileError, match="made by tokenizer"):
        alike.check(tiny, layout)


def test_files_of_another_kind_of_code_are_refused(tiny):
    grid = TileGrid(32, 32, 32, 8)
    models = [tiny]
    for name, channels in (("none", 16), ("kl", 16), ("fsq", 6)):
        models.append(FlowMo(model_config("tiny", decoder_depth=1, quantizer=name, latent_channels=channels)))
    layouts = [file_layout(model) for model in models]
    assert len({layout.tokenizer for layout in layouts}) == 4
    files = [TokenFile.pack(grid, torch.zeros(1, 16, x.channels), x) for x in layouts]
    for i, (model, layout) in enumerate(zip(models, layouts)):
        files[i].check(model, layout)
        for j, file in enumerate(files):
            words = "made by tokenizer" if (i in (0, 3)) == (j in (0, 3)) else "real numbers"
            if i != j:
                with pytest.raises(TokenFileError, match=words):
                    file.check(model, layout)
