"""Encoding: markers become image tokens; cuts fall between words and never inside an image."""

import numpy as np
import pytest
from moca.data.encode import Encoder
from moca.data.images import decode, patchify, resize
from moca.data.prompts import prompted
from moca.data.records import IMAGE_MARKER, Document
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

WORDS = "the quick brown fox jumps over the lazy dog "


@pytest.fixture
def encoder(tokenizer, settings):
    return Encoder(tokenizer, settings)


def mixed(picture, *, text=WORDS):
    text = f"{text}{IMAGE_MARKER}{text}{IMAGE_MARKER}{IMAGE_MARKER}{text}"
    images = (picture(16, 24), picture(40, 16, 1), picture(8, 8, 2))
    return Document(text, images, "row 1")


def runs_of_images(encoder, encoded):
    """Checks that every image is whole and bracketed; returns their token counts."""
    ids = encoded.input_ids.tolist()
    counts = (encoded.grids.prod(axis=1) // encoder.merge_size**2).tolist()
    starts = [i for i, token in enumerate(ids) if token == encoder.vision_start_id]
    assert len(starts) == len(counts) == ids.count(encoder.vision_end_id)
    for start, count in zip(starts, counts, strict=True):
        assert ids[start + 1 : start + 1 + count] == [encoder.image_token_id] * count
        assert ids[start + 1 + count] == encoder.vision_end_id
    assert ids.count(encoder.image_token_id) == sum(counts)
    assert len(encoded.patches) == encoded.grids.prod(axis=1).sum()
    return counts


def test_markers_become_image_tokens(encoder, picture, tokenizer):
    document = mixed(picture)
    encoded = encoder(document)
    assert runs_of_images(encoder, encoded) == [6, 10, 1]
    assert encoded.input_ids.dtype == np.int64 and encoded.patches.dtype == np.float32
    expanded = document.text
    for count in (6, 10, 1):
        expanded = expanded.replace("<|image_pad|>", "<#>" * count, 1)
    expected = tokenizer(expanded.replace("<#>", "<|image_pad|>"), add_special_tokens=False)
    assert encoded.input_ids.tolist() == expected["input_ids"]
    resized = (resize(decode(image), encoder.settings) for image in document.images)
    patches = [patchify(np.asarray(image), encoder.settings) for image in resized]
    np.testing.assert_array_equal(encoded.patches, np.concatenate([p for p, _ in patches]))
    assert encoded.grids.tolist() == [list(grid) for _, grid in patches]


def test_text_only(encoder, tokenizer):
    encoded = encoder(Document(WORDS))
    assert encoded.input_ids.tolist() == tokenizer(WORDS)["input_ids"]
    assert encoded.patches.shape == (0, encoder.settings.patch_dim)
    assert encoded.grids.shape == (0, 3) and len(encoded) == len(encoded.input_ids)


@pytest.mark.parametrize("length", range(1, 70, 3))
def test_truncation_never_cuts_an_image(tokenizer, settings, picture, length):
    encoder = Encoder(tokenizer, settings, length)
    document = mixed(picture)
    whole = Encoder(tokenizer, settings)(document)
    encoded = encoder(document)
    assert 0 < len(encoded) <= length
    kept = runs_of_images(encoder, encoded)
    assert encoder.counts["images dropped"] == 3 - len(kept)
    assert encoder.counts["documents truncated"] == (len(whole) > length)
    assert all(encoder.counts.values())
    assert len(encoder(document, truncate=False)) == len(whole)


def test_text_after_an_image_that_does_not_fit_is_used(tokenizer, settings, picture):
    encoder = Encoder(tokenizer, settings, 10)
    encoded = encoder(Document(f"{IMAGE_MARKER}{WORDS}", (picture(40, 40),)))
    assert encoded.input_ids.tolist() == tokenizer(WORDS)["input_ids"][:10]
    assert encoder.counts == {"images dropped": 1, "documents truncated": 1}


def test_wording_after_a_document_that_is_cut_is_kept(tokenizer, settings, picture):
    text, after = tokenizer(WORDS * 9)["input_ids"], tokenizer("\nfox")["input_ids"]
    document = prompted(Document(WORDS * 9), "{}\nfox")
    assert len(Encoder(tokenizer, settings)(document)) == len(text) + len(after)
    room = 20 + len(after)
    encoder = Encoder(tokenizer, settings, room)
    assert encoder(document).input_ids.tolist() == text[:20] + after
    page = prompted(
        Document(f"{WORDS}{IMAGE_MARKER}{WORDS}", (picture(8, 8),)), "{image}{text}\nfox"
    )
    cut = encoder(page).input_ids.tolist()
    assert cut[3:] == tokenizer(WORDS * 2)["input_ids"][:17] + after
    assert encoder.counts == {"documents truncated": 2}
    # Without room for both, the document goes first; so does an image that the wording would cost.
    assert (
        Encoder(tokenizer, settings, len(after))(document).input_ids.tolist() == text[: len(after)]
    )
    image = prompted(Document(IMAGE_MARKER, (picture(40, 40),)), "{}\nfox")
    encoder = Encoder(tokenizer, settings, 28)
    assert runs_of_images(encoder, encoder(image)) == [25] and encoder.counts.total() == 1


def test_an_image_alone_that_does_not_fit_is_an_error(tokenizer, settings, picture):
    encoder = Encoder(tokenizer, settings, 10)
    document = Document(IMAGE_MARKER, (picture(40, 40),), "row 3")
    with pytest.raises(ValueError, match=r"row 3.*27 tokens.*max_length 10"):
        encoder(document)


@pytest.mark.parametrize("text", ["", "\n"])
@pytest.mark.parametrize("prompt", ["", "the dog ", "{}the dog", "the {image}quick {text}dog"])
def test_wording_alone_is_no_document(tokenizer, settings, picture, prompt, text):
    """An image that does not fit is an error beside the wording of a prompt too."""
    document = prompted(Document(IMAGE_MARKER + text, (picture(40, 40),), "row 3"), prompt)
    encoder = Encoder(tokenizer, settings, 26)
    for function in (encoder, encoder.check):
        with pytest.raises(ValueError, match=r"row 3: an image of 27 tokens.*max_length 26"):
            function(document)
    before = len(tokenizer(prompt.partition("{image}")[0].removesuffix("{}"))["input_ids"])
    room = 27 + (0 if prompt.startswith("{}") else before)
    encoder = Encoder(tokenizer, settings, room)
    assert runs_of_images(encoder, encoder(document)) == [25]
    if room > 27:
        with pytest.raises(ValueError, match="with the wording around it, and nothing else"):
            Encoder(tokenizer, settings, room - 1)(document)


@pytest.mark.parametrize("prompt", ["{}", "{image}{text}"])
def test_wording_leaves_room_for_words_of_the_document(tokenizer, settings, picture, prompt):
    before, after = "the lazy dog ", "\nover the fox"
    prompt = prompt.replace("}", "}" + before, 1) if "image" in prompt else before + prompt
    image = Document(f"{IMAGE_MARKER}{WORDS}", (picture(40, 40),), "row 3")
    opening, closing = len(tokenizer(before)["input_ids"]), len(tokenizer(after)["input_ids"])
    for document in (image, Document(WORDS, (), "row 3")):
        document = prompted(document, prompt + after)
        with pytest.raises(ValueError, match=r"row 3: .* does not fit.*nothing else"):
            Encoder(tokenizer, settings, opening)(document)
        for room in range(opening + 2, opening + closing + 4):
            ids = Encoder(tokenizer, settings, room)(document).input_ids.tolist()
            assert tokenizer.decode(ids).startswith(f"{before}the") and len(ids) == room


@pytest.mark.parametrize("budget", [12, 13, 17, 20, 33, 64, 500])
def test_split_keeps_everything_and_cuts_between_words(encoder, picture, tokenizer, budget):
    document = mixed(picture, text=WORDS * 3)
    whole, pieces = encoder(document), encoder.split(document, budget)
    parts = [encoder.encode(piece) for piece in pieces]
    assert [len(part) for part in parts] == [len(piece) for piece in pieces]
    assert [len(part.patches) for part in parts] == [4 * piece.image_tokens for piece in pieces]
    assert all(0 < len(part) <= budget for part in parts)
    ids = np.concatenate([part.input_ids for part in parts])
    np.testing.assert_array_equal(ids, whole.input_ids)
    np.testing.assert_array_equal(np.concatenate([p.patches for p in parts]), whole.patches)
    np.testing.assert_array_equal(np.concatenate([p.grids for p in parts]), whole.grids)
    assert sum(len(runs_of_images(encoder, part)) for part in parts) == 3
    for part in parts[:-1]:
        words = tokenizer.decode(part.input_ids[part.input_ids > 3]).split()
        assert set(words) <= set(WORDS.split())
    assert (len(parts) == 1) == (len(whole) <= budget)


def test_split_cuts_a_word_only_when_it_must(encoder):
    pieces = encoder.split(Document("the " + "x" * 30 + " dog"), 8)
    parts = [encoder.encode(piece) for piece in pieces]
    assert all(len(part) <= 8 for part in parts)
    assert encoder.tokenizer.decode(parts[0].input_ids) == "the"


def test_split_refuses_an_image_above_the_budget(encoder, picture):
    document = Document(f"a{IMAGE_MARKER}", (picture(40, 40),), "row 3")
    with pytest.raises(ValueError, match=r"row 3.*27 tokens.*budget of 26"):
        encoder.split(document, 26)
    assert len(encoder.split(document, 27)) == 2
    with pytest.raises(ValueError, match="positive"):
        encoder.split(document, 0)


def test_a_piece_reads_its_own_images_only(encoder, picture, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(picture(40, 16, number))
    document = Document(f"{WORDS}{IMAGE_MARKER}" * 3, tuple(paths), "row 4")
    pieces = encoder.split(document, 22)
    assert [len(piece.images) for piece in pieces] == [1, 1, 1]
    paths[1].unlink()
    assert len(encoder.encode(pieces[0])) == len(encoder.encode(pieces[2])) == len(pieces[0])
    with pytest.raises(ValueError, match="row 4: image 1: image file not found"):
        encoder.encode(pieces[1])


@pytest.mark.parametrize("length", [1, 5, 11, 12, 60])
def test_check_finds_what_encoding_would(tokenizer, settings, picture, length):
    encoder = Encoder(tokenizer, settings, length)
    documents = [
        mixed(picture),
        Document(IMAGE_MARKER, (picture(40, 16),), "row 1"),
        Document(IMAGE_MARKER, (picture()[:-200],), "row 2"),
        Document(" ", (), "row 3"),
    ]
    for document in documents:
        raised = []
        for function in (encoder.check, encoder):
            try:
                function(document)
            except ValueError as error:
                raised.append(str(error))
        assert len(set(raised)) in (0, 1) and len(raised) in (0, 2)
    assert encoder.counts["documents truncated"] == (length < 60)  # of encoding, none of checking


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_documents_are_refused(encoder, text):
    with pytest.raises(ValueError, match="row 2: the document is empty"):
        encoder(Document(text, (), "row 2"))
    with pytest.raises(ValueError, match="row 2: the document is empty"):
        encoder.split(Document(text, (), "row 2"), 10)


def test_a_bad_image_names_the_record(encoder, picture):
    images = (picture(), picture()[:-200])
    document = Document(IMAGE_MARKER * 2, images, "file.jsonl line 7")
    with pytest.raises(ValueError, match=r"file\.jsonl line 7: image 1: cannot read image"):
        encoder(document)
    thin = Document(IMAGE_MARKER, (picture(1, 5000),), "row 8")
    with pytest.raises(ValueError, match="row 8: image 0: the aspect ratio"):
        encoder(thin)


def test_a_tokenizer_without_vision_tokens_is_refused(settings):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match=r"no token <\|vision_start\|>"):
        Encoder(bare, settings)
    with pytest.raises(ValueError, match="max_length"):
        Encoder(bare, settings, 0)


@pytest.mark.parametrize("known", [0, 3, 1 << 22])
def test_texts_whose_tokens_are_remembered_encode_alike(tokenizer, settings, monkeypatch, known):
    monkeypatch.setattr("moca.data.encode.KNOWN_TOKENS", known)
    encoder = Encoder(tokenizer, settings)
    texts = [Document(text) for text in ("red apple", "A red apple, a green pear.", "red apple")]
    first = [encoder(text).input_ids for text in texts]
    again = [encoder(text).input_ids for text in texts]
    for ids, same in zip(first, again, strict=True):
        assert np.array_equal(ids, same) and ids.flags.writeable
    assert np.array_equal(first[0], first[2])
