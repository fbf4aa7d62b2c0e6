"""The token cache: layouts, files, and the batches drawn from them."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowmo import FlowMo, model_config
from flowmo.data.tokens import (
    CROPS,
    TokenBatches,
    TokenCache,
    TokenCacheError,
    TokenHeader,
    TokenLayout,
    fingerprint,
    layout_of,
    picture_views,
)

PARITY, CONTIGUOUS = TokenLayout(512, 9, 18), TokenLayout(512, 9, 18, "contiguous")


def codes(batch: int = 3) -> Tensor:
    return torch.randn(batch, 256, 18, generator=torch.Generator().manual_seed(0))


def released_indices(latent: Tensor) -> Tensor:
    """Indices as the released quantizer forms them: 'b t (fg fh) -> b fg (t fh)', then bits with weights 2^fg."""
    b, t, _ = latent.shape
    grouped = latent.reshape(b, t, 9, 2).permute(0, 2, 1, 3).reshape(b, 9, t * 2)
    return ((grouped > 0) * (2 ** torch.arange(9))[:, None]).sum(1)


def test_parity_is_the_quantizers_own_grouping():
    latent = codes()
    tokens = PARITY.encode(latent)
    assert tokens.shape == (3, 512) and torch.equal(tokens, released_indices(latent))
    signs = torch.where(latent > 0, 1.0, -1.0)
    assert torch.equal(PARITY.decode(tokens), signs)
    for t in (0, 5):
        for half in (0, 1):
            bits = sum(2**k for k in range(9) if latent[1, t, 2 * k + half] > 0)
            assert int(tokens[1, 2 * t + half]) == bits


def test_zero_counts_as_minus():
    assert PARITY.encode(torch.zeros(1, 256, 18)).sum() == 0


@pytest.mark.parametrize("channel", range(18))
def test_single_bits(channel):
    """One positive channel of one latent token sets one bit of one token."""
    latent = torch.full((1, 256, 18), -1.0)
    latent[0, 7, channel] = 1.0
    for layout, half, bit in ((PARITY, channel % 2, channel // 2), (CONTIGUOUS, channel // 9, channel % 9)):
        expected = torch.zeros(1, 512, dtype=torch.int64)
        expected[0, 14 + half] = 2**bit
        tokens = layout.encode(latent)
        assert torch.equal(tokens, expected)
        assert torch.equal(layout.decode(tokens), latent)


def test_contiguous_goes_back_too():
    latent = codes()
    assert torch.equal(CONTIGUOUS.decode(CONTIGUOUS.encode(latent)), torch.where(latent > 0, 1.0, -1.0))
    assert not torch.equal(CONTIGUOUS.encode(latent), PARITY.encode(latent))
    with pytest.raises(ValueError, match="parity, contiguous"):
        TokenLayout(512, 9, 18, "halves")


def test_layout_of_a_tokenizer():
    torch.manual_seed(0)
    model, other = FlowMo("tiny"), FlowMo("tiny")
    layout = layout_of(model)
    assert (layout.tokens, layout.bits, layout.channels, layout.grouping) == (32, 9, 18, "parity")
    assert layout.tokenizer == fingerprint(model) != fingerprint(other) and len(layout.tokenizer) == 64
    with torch.no_grad():
        model.decoder.img_in.weight.add_(1.0)
    assert fingerprint(model) == layout.tokenizer  # a decoder trained further reads the same tokens
    with torch.no_grad():
        model.encoder.img_in.weight[0, 0].add_(1e-6)
    assert fingerprint(model) != layout.tokenizer
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(layout.encode(other.encode(images)), other.tokenize(images))
    with pytest.raises(ValueError, match="no tokens"):
        layout_of(FlowMo(model_config("tiny", quantizer="none", latent_channels=16)))


FSQ_SIZES = {"quantizer": "fsq", "fsq_levels": [8, 5, 5, 5], "latent_channels": 8}


@pytest.mark.parametrize(
    ("code", "sizes"),
    [
        ("9", {}),
        ("fsq [8, 5, 5, 5]", FSQ_SIZES),
        ("kl", {"quantizer": "kl", "latent_channels": 16}),
        ("none", {"quantizer": "none", "latent_channels": 16}),
    ],
)
def test_a_fingerprint_is_of_the_bytes_that_docs_format_names(code, sizes):
    """Files made before carry it: one that is taken of other bytes makes all of them foreign."""
    model = FlowMo(model_config("tiny", encoder_depth=1, decoder_depth=1, **sizes))
    c = model.config
    said = f"{c.image_size} {c.latent_tokens} {c.latent_channels} {code}".encode()
    for name, weight in sorted(model.encoder.state_dict().items()):
        said += f"{name} {list(weight.shape)}".encode() + weight.numpy().astype("<f4").tobytes()
    assert fingerprint(model) == hashlib.sha256(said).hexdigest()


def header(pictures: int = 5, views: int = 2, **layout) -> TokenHeader:
    # 7 tokens of 9 bits: 63 bits, so that the last byte is not full
    fields = {"tokens": 7, "bits": 9, "channels": 9, "tokenizer": "a" * 64, **layout}
    return TokenHeader(TokenLayout(**fields), pictures, views, "center+flip", 32, "float32", ["x", "y"], "d")


def tokens_of(pictures: int = 5, views: int = 2) -> Tensor:
    return torch.randint(0, 512, (pictures, views, 7), generator=torch.Generator().manual_seed(3))


def full_cache(folder, labels=(0, 1, 1, 0, 1)) -> TokenCache:
    cache = TokenCache.create(folder, header(len(labels)), labels)
    cache.write(range(len(labels)), tokens_of(len(labels)))
    return TokenCache.open(folder)


def test_written_and_read(tmp_path):
    cache = full_cache(tmp_path / "c")
    assert isinstance(cache.packed, np.memmap) and cache.packed.shape == (5, 2, 8)
    for view in (0, 1):
        tokens, labels = cache.read(np.array([4, 0]), np.array([view, view]))
        assert torch.equal(tokens, tokens_of()[[4, 0], view]) and tokens.dtype == torch.int64
        assert labels.tolist() == [1, 0]
    content = json.loads((tmp_path / "c" / "header.json").read_text())
    layout = {"tokens": 7, "bits": 9, "channels": 9, "grouping": "parity", "tokenizer": "a" * 64, "levels": []}
    assert content["layout"] == layout
    assert content["crop"] == "center+flip" and content["dtype"] == "float32" and content["classes"] == ["x", "y"]


def test_an_interrupted_cache_goes_on(tmp_path):
    cache = TokenCache.create(tmp_path, header(), [0, 1, 1, 0, 1])
    cache.write([1, 3], tokens_of()[[1, 3]])
    with pytest.raises(TokenCacheError, match="3 of 5 pictures are not tokenized yet"):
        TokenCache.open(tmp_path)
    again = TokenCache.create(tmp_path, header(), [0, 1, 1, 0, 1])
    assert again.todo().tolist() == [0, 2, 4]
    again.write([0, 2], tokens_of()[[0, 2]])
    again.mark_unreadable([4])
    done = TokenCache.open(tmp_path)
    assert torch.equal(done.read(np.arange(4), np.ones(4, int))[0], tokens_of()[:4, 1])
    seen = [int(i) for _ in range(3) for i in next(TokenBatches(done, 4))[1]]
    assert len(seen) == 12
    assert "4 pictures x 2 views" in done.describe()


def test_a_header_less_folder_is_made_anew(tmp_path):
    """Killed while its files were made: there is no header yet."""
    TokenCache.create(tmp_path, header(3), [0, 0, 0])
    (tmp_path / "header.json").unlink()
    assert TokenCache.create(tmp_path, header(), [0, 1, 1, 0, 1]).todo().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"tokenizer": "b" * 64}, "tokenizer: aaaaaaaaaaaa and bbbbbbbbbbbb"),
        ({"grouping": "contiguous"}, "grouping: parity and contiguous"),
        ({"tokens": 6}, "tokens: 7 and 6"),
        ({"bits": 3, "channels": 3}, "bits: 9 and 3"),
    ],
)
def test_another_tokenizer_or_layout_is_an_error(tmp_path, changed, word):
    full_cache(tmp_path)
    assert TokenCache.open(tmp_path, header().layout)
    assert TokenCache.open(tmp_path, header(tokenizer="").layout)  # one that does not know its tokenizer
    with pytest.raises(TokenCacheError, match=word):
        TokenCache.open(tmp_path, header(**changed).layout)
    with pytest.raises(TokenCacheError, match="name another folder"):
        TokenCache.create(tmp_path, header(**changed), [0, 1, 1, 0, 1])


def test_damaged_caches(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"flowmo\.tokenize DATA"):
        TokenCache.open(tmp_path / "nowhere")
    full_cache(tmp_path / "a")
    np.save(tmp_path / "a" / "tokens.npy", np.zeros((5, 2, 7), np.uint8))
    with pytest.raises(TokenCacheError, match=r"\[5, 2, 7\], its header says \[5, 2, 8\]"):
        TokenCache.open(tmp_path / "a")
    (tmp_path / "a" / "tokens.npy").write_bytes(b"\x93NUM")
    with pytest.raises(TokenCacheError, match="damaged"):
        TokenCache.open(tmp_path / "a")
    full_cache(tmp_path / "b")
    np.save(tmp_path / "b" / "state.npy", np.ones(4, np.uint8))  # the last picture's is gone
    with pytest.raises(TokenCacheError, match="tokenize again"):
        TokenCache.open(tmp_path / "b")
    (tmp_path / "a" / "header.json").write_text('{"layout": {"tokens": 3}}')
    with pytest.raises(TokenCacheError, match=r"header\.json"):
        TokenCache.open(tmp_path / "a")


def test_pictures_without_a_class(tmp_path):
    cache = full_cache(tmp_path, labels=(0, -1, 1, 0, -1))
    with pytest.raises(ValueError, match="2 pictures have no class"):
        TokenBatches(cache, 2)


def test_a_cache_of_other_files_is_not_gone_on_with(tmp_path):
    """Its pictures are numbered by the list of files: those of another list would get the labels of this one."""
    TokenCache.create(tmp_path, header(), [0, 1, 1, 0, 1])
    other = header()
    other.data = "e"
    with pytest.raises(TokenCacheError, match='data: "d" there and "e" here'):
        TokenCache.create(tmp_path, other, [0, 1, 1, 0, 1])


def test_unreadable_pictures_are_never_drawn(tmp_path):
    """Their place in the files holds zeros, which are a valid code."""
    cache = TokenCache.create(tmp_path, header(), [0, 1, 1, 0, -1])  # nor does it matter that one has no class
    cache.write([0, 1, 3], torch.full((3, 2, 7), 5))
    cache.mark_unreadable([2, 4])
    batches = TokenBatches(TokenCache.open(tmp_path), 3)
    assert all((next(batches)[0] == 5).all() for _ in range(4))
    state = batches.state_dict()
    full = TokenBatches(full_cache(tmp_path / "full"), 3)
    with pytest.raises(ValueError, match="pictures=3, this run has 5"):
        full.load_state_dict(state)
    with pytest.raises(ValueError, match=r"tokens=.*bbbb.*this run has .*aaaa"):
        full.load_state_dict({**full.state_dict(), "tokens": ["b" * 64, 7, 9, "parity"]})
    cache.mark_unreadable(range(5))
    with pytest.raises(TokenCacheError, match="none of its pictures could be read"):
        TokenCache.open(tmp_path)


def test_an_epoch_visits_every_picture_once(tmp_path):
    n = 23
    cache = TokenCache.create(tmp_path, header(n), [0] * n)
    marked = torch.arange(n)[:, None, None] * 2 + torch.arange(2)[None, :, None]  # token = 2 picture + view
    cache.write(range(n), marked.expand(n, 2, 7))
    batches = TokenBatches(TokenCache.open(tmp_path), 5, seed=1)
    values = torch.cat([next(batches)[0][:, 0] for _ in range(46)]).reshape(10, n)
    for epoch in values:
        assert sorted((epoch // 2).tolist()) == list(range(n))
    assert values.remainder(2).float().mean().sub(0.5).abs() < 5 * 0.5 / 230**0.5  # both views, alike
    assert not torch.equal(values[0] // 2, values[1] // 2)


def test_batches_are_larger_than_the_cache(tmp_path):
    tokens, labels = next(TokenBatches(full_cache(tmp_path), 12))
    assert tokens.shape == (12, 7) and labels.shape == (12,)


def test_batches_continue_and_divide_among_processes(tmp_path):
    cache = full_cache(tmp_path)
    alone = TokenBatches(cache, 4, seed=2)
    stream = [next(alone)[0] for _ in range(6)]
    resumed = TokenBatches(cache, 4, seed=2)
    next(resumed), next(resumed)
    state = resumed.state_dict()
    other = TokenBatches(cache, 4, seed=2)
    other.load_state_dict(state)
    assert torch.equal(next(other)[0], stream[2])
    parts = [TokenBatches(cache, 2, seed=2, rank=r, world=2) for r in (0, 1)]
    for whole in stream:
        assert torch.equal(torch.cat([next(p)[0] for p in parts]), whole)
    assert parts[1].position == 24
    with pytest.raises(ValueError, match="seed=2"):
        TokenBatches(cache, 4, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match="rank=2"):
        TokenBatches(cache, 4, rank=2, world=2)


def picture(width: int = 96, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_views_of_a_picture():
    img = picture()
    center = picture_views(img, 32, "center")
    assert center.shape == (1, 3, 32, 32) and center.dtype == torch.uint8
    both = picture_views(img, 32, "center+flip")
    assert torch.equal(both[:1], center) and torch.equal(both[1], center[0].flip(-1))
    ten = picture_views(img, 32, "ten-crop")
    square = np.asarray(img.resize((52, 35), Image.Resampling.BILINEAR).crop((8, 0, 43, 35)))
    corners = [square[:32, :32], square[:32, 3:], square[3:, :32], square[3:, 3:], square[2:34, 2:34]]
    for view, expected in zip(ten, corners):
        assert np.array_equal(view.permute(1, 2, 0).numpy(), expected)
    assert torch.equal(ten[5:], ten[:5].flip(-1))
    at_50 = picture_views(img, 50, "ten-crop")[4].permute(1, 2, 0).numpy()  # (55 - 50) / 2 = 2.5 goes to the even side
    square = np.asarray(img.resize((82, 55), Image.Resampling.BILINEAR).crop((14, 0, 69, 55)))
    assert np.array_equal(at_50, square[2:52, 2:52])
    assert {crop: len(picture_views(img, 32, crop)) for crop in CROPS} == CROPS
    with pytest.raises(ValueError, match="ten-crop"):
        picture_views(img, 32, "five-crop")
