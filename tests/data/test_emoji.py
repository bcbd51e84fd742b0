"""Emoji: what is drawn, its classes and captions; and caption vectors against scikit-learn's counts."""

import unicodedata

import numpy as np
import pytest
import torch

from rfkernels.data import (
    EMOJI_CLASSES,
    caption_conditioned,
    caption_vectors,
    emoji,
    find_emoji_font,
    load_dataset,
)
from rfkernels.data.emoji_classes import emoji_class
from rfkernels.data.emoji_sequences import sequences_of

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def font():
    try:
        return find_emoji_font()
    except FileNotFoundError:
        pytest.skip("needs the font NotoColorEmoji.ttf (apt install fonts-noto-color-emoji)")


@pytest.fixture(scope="module")
def data(font):
    return emoji(24, font=font)


def test_images_labels_and_captions_belong_together(data):
    assert len(data) > 1300
    assert data.sample_shape == (3, 24, 24)
    assert data.x.dtype == torch.float32
    assert (data.x.min(), data.x.max()) == (-1, 1)
    assert data.num_classes == len(EMOJI_CLASSES) == 10
    assert data.labels.bincount(minlength=10).min() > 50
    assert len(set(data.captions)) == len(data)
    points = [ord(unicodedata.lookup(caption)) for caption in data.captions]
    assert points == sorted(points)
    assert data.labels.tolist() == [emoji_class(p) for p in points]
    # The colours that the names tell, from the middle of the picture.
    middle = data.x[:, :, 8:16, 8:16].mean(dim=(2, 3))
    for caption, high, low in (
        ("large red circle", 0, 2),
        ("large blue circle", 2, 0),
        ("green heart", 1, 2),
        ("grinning face", 0, 2),
    ):
        red_green_blue = middle[data.captions.index(caption)]
        assert red_green_blue[high] > red_green_blue[low] + 0.3, caption


def test_no_picture_is_empty(data):
    flat = data.x.flatten(1)
    assert (flat.std(dim=1) > 0.02).all()
    assert len(np.unique(flat.numpy(), axis=0)) > 0.99 * len(data)


def test_background_and_name(data, font):
    black = emoji(8, font=font, background=(0, 0, 0))
    assert (black.x[:, :, 0, 0] < -0.95).float().mean() > 0.8
    named = load_dataset("emoji", image_size=24)
    assert named.name == "emoji"
    assert torch.equal(named.x, data.x)


def test_captions_go_along(data):
    index = torch.tensor([5, 700])
    part = data.take(index)
    assert part.captions == (data.captions[5], data.captions[700])
    conditioned = caption_conditioned(part, 16)
    assert torch.equal(conditioned.labels, caption_vectors(part.captions, 16))
    assert conditioned.num_classes is None
    with pytest.raises(ValueError, match="data: must have captions"):
        caption_conditioned(load_dataset("ring", size=3))


def test_sequences(data, font):
    from PIL import features

    if not features.check("raqm"):
        pytest.skip("needs a Pillow with Raqm")
    both = emoji(8, font=font, sequences=True)
    assert len(both) > 3000
    assert both.captions[: len(data)] == data.captions
    more = both.captions[len(data) :]
    assert len(set(more)) == len(more)
    letters = "regional indicator symbol letter"
    assert f"{letters} f, {letters} r" in more
    assert f"{letters} z, {letters} z" not in more
    assert "waving hand sign, emoji modifier fitzpatrick type-4" in more
    assert "woman, rocket" in more


def test_sequences_without_a_font():
    """The search itself, with a made-up font that joins a few."""
    known = {"🇫🇷", "👋🏻", "👩‍🚀", "👩🏻", "👩🏻‍🚀", "👩🏿‍🚀", "👨‍👩‍👧"}
    found = sequences_of(["👋", "👨", "👩", "🚀"], known.__contains__)
    toned = [base + tone for base in "👋👩" for tone in "🏻🏼🏽🏾🏿"]
    keycaps = [f"{c}\ufe0f\u20e3" for c in "#*0123456789"]
    assert found == ["🇫🇷", *keycaps, *toned, "👩‍🚀", "👩🏻‍🚀", "👩🏿‍🚀", "👨‍👩‍👧"]


def test_classes():
    examples = {
        "face": "😀😺🤖👻",
        "body": "👋🦷🫀🤝",
        "person": "👮🧙🙋🤷",
        "animal": "🐍🦋🪲🕊",
        "nature": "🌲⛄🪐🔥",
        "food": "🍕🥐🧀🫐",
        "place": "🏠🚀⛪🗿",
        "activity": "🎃🏀🎲⚽",
        "object": "🔨📷👗🪑",
        "symbol": "\N{HEAVY PLUS SIGN}💙🔴↗",
    }
    assert tuple(sorted(examples)) == tuple(sorted(EMOJI_CLASSES))
    for name, characters in examples.items():
        assert [EMOJI_CLASSES[emoji_class(ord(c))] for c in characters] == [name] * 4


def test_the_font_is_searched_and_its_absence_has_a_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt install fonts-noto-color-emoji"):
        emoji()
    file = tmp_path / "shared/fonts/truetype/NotoColorEmoji.ttf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a font")
    assert find_emoji_font() == file
    with pytest.raises(ValueError, match=r"NotoColorEmoji\.ttf has no colour bitmaps"):
        emoji()
    with pytest.raises(FileNotFoundError, match="no such file"):
        emoji(font=tmp_path / "absent.ttf")


def test_a_font_without_colour_is_refused():
    matplotlib = pytest.importorskip("matplotlib")
    plain = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    with pytest.raises(ValueError, match="draws no colour bitmaps of 109 pixels"):
        emoji(font=plain)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="size: must be at least 1"):
        emoji(0)
    for background in ((0, 0), (0, 0, 256)):
        with pytest.raises(ValueError, match="background: must be three numbers"):
            emoji(background=background)
    with pytest.raises(ValueError, match="size: emoji has no such option"):
        load_dataset("emoji", size=3)


def test_caption_vectors_keep_the_similarity_of_counts():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    captions = [
        "grinning face with smiling eyes",
        "smiling face with heart-shaped eyes",
        "clock face ten-thirty",
        "red apple",
        "Green APPLE",
        "naïve façade 数字",
    ]
    words = text.CountVectorizer(token_pattern=r"\w+").fit_transform(captions).toarray()
    reference = words.astype(float) @ words.T
    # n-grams of a word weigh 1 / sqrt(their number), so each word is counted by hand.
    grams = text.CountVectorizer(analyzer="char", ngram_range=(3, 4), lowercase=False)
    tokens = [text.CountVectorizer(token_pattern=r"\w+").build_analyzer()(c) for c in captions]
    flat = [f"<{token}>" for row in tokens for token in row]
    counts = grams.fit_transform(flat).toarray().astype(float)
    counts /= np.sqrt(counts.sum(1, keepdims=True))
    owner = np.repeat(np.arange(len(captions)), [len(row) for row in tokens])
    summed = np.zeros((len(captions), counts.shape[1]))
    np.add.at(summed, owner, counts)
    reference += summed @ summed.T
    norms = np.sqrt(np.diag(reference))
    reference /= norms[:, None] * norms
    found = caption_vectors(captions, 1 << 14).double().numpy()
    # The deviation of a hashed inner product of unit vectors is at most sqrt(2 / dim) = 0.011.
    np.testing.assert_allclose(found @ found.T, reference, atol=4 * 0.011)
    small = caption_vectors(captions, 64)
    assert small.shape == (6, 64)
    torch.testing.assert_close(small.norm(dim=1), torch.ones(6))
    np.testing.assert_allclose((small @ small.T).numpy(), reference, atol=4 * 0.177)
    assert (small[3] @ small[4]) > (small[0] @ small[4]) + 0.3


def test_caption_vectors_are_fixed():
    """The hash is BLAKE2b of the feature, as documented; "a" has the features of "<a>"."""
    from hashlib import blake2b

    expected = np.zeros(8)
    for feature in ("w a", "g <a>"):
        bits = int.from_bytes(blake2b(feature.encode(), digest_size=8).digest(), "little")
        expected[(bits >> 1) % 8] += 1 if bits & 1 else -1
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(
        caption_vectors(["\N{FULLWIDTH LATIN CAPITAL LETTER A}!"], 8)[0].numpy(),
        expected,
        atol=1e-7,
    )
    assert caption_vectors(["", "?!"], 8).abs().sum() == 0
    with pytest.raises(TypeError, match="captions: must be a sequence of strings"):
        caption_vectors("a caption")
    with pytest.raises(ValueError, match="dim: must be at least 1"):
        caption_vectors(["a"], 0)
