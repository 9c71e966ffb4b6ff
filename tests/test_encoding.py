"""Bounds of tokens told by their bytes: exact for any kind of tokenizer, and never guessed."""

import json
import os
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from open_r1.encoding import CLOSE, IGNORED, OPEN, Piece, encode_pieces, encoders, spelling_of


def byte_level(texts, normalizer=None, bos=False):
    """As Qwen and Llama 3 do it; with `bos`, a text starts with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(texts, trainer)
    return wrapped(tokenizer, bos)


def sentencepiece(texts, bos=False):
    """As Gemma does it: spaces are written as `▁`, what no token holds as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, limit_alphabet=60)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are ordinary tokens
    return wrapped(Tokenizer.from_str(json.dumps(state)), bos)


def wrapped(tokenizer, bos):
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def texts(pairs):
    return [text for pair in pairs for text in pair]


def pieces_of(texts, **fields):
    """Texts, of each the middle third supervised."""
    return [Piece(n, text=t, spans=[(len(t) // 3, 2 * len(t) // 3)], **fields) for n, t in enumerate(texts)]


def encoded(pieces, tokenizer, spelling):
    encode_pieces(pieces, tokenizer, spelling)
    return [(piece.ids.tolist(), piece.labels.tolist()) for piece in pieces]


MAKERS = {
    "byte level": byte_level,
    "byte level, NFC": lambda texts: byte_level(texts, normalizers.NFC()),
    "sentencepiece": sentencepiece,
}
HARD = [
    "e\u0301a " * 30,
    "Ångström \u212b " * 9,
    "四 é\u0301 👩‍👩‍👧 עברית " * 5,
    "\u2581 no space " * 9,
    " \n\n\t " * 9,
]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_bytes_and_offsets_tell_the_same(make, texts):
    tokenizer = make(texts)
    spelling = spelling_of(tokenizer)
    assert spelling.texts is not None
    sample = [*texts[:400], *HARD]
    offsets = encoded(pieces_of(sample), tokenizer, replace(spelling, texts=None))
    assert encoded(pieces_of(sample), tokenizer, spelling) == offsets


def test_threads_change_nothing(texts, monkeypatch):
    tokenizer = byte_level(texts)
    spelling, sample = spelling_of(tokenizer), [*texts, *HARD] * 2
    alone = encoded(pieces_of(sample), tokenizer, spelling)
    assert encoders(os.getpid())._max_workers == 1  # TOKENIZERS_PARALLELISM is false in tests
    for parallelism, expected in (("true", 3), ("FALSE", 1), (None, 3)):
        encoders.cache_clear()
        monkeypatch.setattr("open_r1.encoding.cores_here", lambda: {0, 1, 2})
        if parallelism is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM")
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallelism)
        assert encoded(pieces_of(sample), tokenizer, spelling) == alone
        assert encoders(os.getpid())._max_workers == expected
    encoders.cache_clear()


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_a_supervised_stretch_is_the_text_of_its_tokens(make, texts):
    tokenizer = make(texts)
    pieces = pieces_of([*texts[:400], *HARD[:3]])
    encode_pieces(pieces, tokenizer, spelling_of(tokenizer))
    for piece in pieces:
        start, end = piece.spans[0]
        said = tokenizer.decode(piece.ids[slice(*piece.ranges[0])])
        assert said.startswith(piece.text[start:end]) and piece.text[start:].startswith(said)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_is_asked_and_what_is_said_are_encoded_apart_where_a_token_would_hold_both(make, texts):
    tokenizer = make(texts)
    piece = Piece(0, text="Say the__doc__", spans=[(5, 14)])  # "the" is one token of the whole
    assert len(tokenizer.encode("the", add_special_tokens=False)) < len("the")
    encode_pieces([piece], tokenizer, spelling_of(tokenizer))
    asked, said = (tokenizer.encode(text, add_special_tokens=False) for text in ("Say t", "he__doc__"))
    assert piece.ids.tolist() == asked + said
    assert piece.labels.tolist() == [IGNORED] * len(asked) + said


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_bos_stands_before_plain_text_only(make, texts):
    tokenizer = make(texts, bos=True)
    spelling = spelling_of(tokenizer)
    assert spelling.bos == [tokenizer.bos_token_id]
    plain, asked, torn, chat = (
        Piece(0, text="Say the__doc__", spans=[(0, 14)], add_bos=True),
        Piece(1, text="Say the__doc__", spans=[(3, 14)], add_bos=True),
        Piece(2, text="Say the__doc__", spans=[(5, 14)], add_bos=True),
        Piece(3, text="<s>Say the__doc__", spans=[(6, 17)]),
    )
    encode_pieces([plain, asked, torn], tokenizer, spelling)
    encode_pieces([chat], tokenizer, spelling)
    whole = tokenizer.encode("Say the__doc__")
    assert whole[0] == tokenizer.bos_token_id
    assert plain.ids.tolist() == plain.labels.tolist() == whole
    assert asked.ids.tolist() == chat.ids.tolist() == whole
    assert tokenizer.decode(asked.labels[asked.labels != IGNORED]) == " the__doc__"
    assert asked.labels.tolist() == chat.labels.tolist()
    assert torn.ids[0] == tokenizer.bos_token_id != torn.labels[0]
    assert torn.labels[torn.labels != IGNORED].tolist() == tokenizer.encode("he__doc__", add_special_tokens=False)


def test_a_vocabulary_that_cannot_spell_its_texts_is_known(texts):
    lowers = byte_level(texts, normalizers.Lowercase())
    assert spelling_of(lowers).texts is None
    piece = Piece(0, text="ASK: Say", spans=[(4, 8)])
    encode_pieces([piece], lowers, spelling_of(lowers))
    assert lowers.decode(piece.labels[piece.labels != IGNORED]) == " say"


def metaspace(texts, scheme):
    """As older Llama and Mistral do it: a space before every text, or after every special token too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, special_tokens=special))
    return wrapped(tokenizer, bos=False)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_no_space_comes_into_what_is_encoded_in_parts(texts, scheme):
    tokenizer = metaspace(texts, scheme)
    text = f"Say:the {OPEN}</s>{CLOSE} token"
    piece = Piece(0, text=text, spans=[(4, len(text))])
    encode_pieces([piece], tokenizer, spelling_of(tokenizer))
    tokens = tokenizer.convert_ids_to_tokens(piece.labels[piece.labels != IGNORED])
    assert "".join(tokens) == "the▁</s>▁token"
    assert tokenizer.eos_token_id not in piece.ids


def test_a_tokenizer_that_ends_texts_itself_ends_none_of_ours(texts):
    tokenizer = byte_level(texts)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    piece = Piece(0, text="Say</s>", spans=[(0, 7)], add_bos=True)
    encode_pieces([piece], tokenizer, spelling_of(tokenizer))
    assert tokenizer.decode(piece.ids) == "<s>Say</s>"


def test_texts_and_renderings_side_by_side(texts):
    tokenizer = byte_level(texts, bos=True)
    text, rendered = (
        Piece(0, text="Say the", spans=[(3, 7)], add_bos=True),
        Piece(1, text="<s>Say the", spans=[(6, 10)]),
    )
    encode_pieces([text, rendered], tokenizer, spelling_of(tokenizer))
    assert text.ids.tolist() == rendered.ids.tolist()
    assert text.labels.tolist() == rendered.labels.tolist()
