"""Preparing a corpus, and the order in which its samples are read."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from deepseek_trainer.data.corpus import BUILTIN, Corpus, open_corpora, read_manifest, resolve
from deepseek_trainer.data.mini import MINI, generate
from deepseek_trainer.data.prepare import END_OF_TEXT, prepare
from deepseek_trainer.data.sampler import BLOCK, Stream, permute, shares
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(
        "Who's there?\nNay, answer me: stand, and unfold yourself.\n" * 40
    )
    (folder / "b.md").write_text("Höher, weiter – naïve café, 漢字 and emoji 🙂.\n" * 40)
    lines = [json.dumps({"text": f"document {number}\n"}) for number in range(30)]
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def prepared(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "corpus"
    prepare([texts], output, vocabulary=400, shard_tokens=500)
    return output


def stream_of_tokens(folder: Path) -> list[int]:
    manifest = read_manifest(folder)
    shards = [np.fromfile(folder / shard.file, manifest.dtype) for shard in manifest.shards]
    return [int(token) for token in np.concatenate(shards)]


def test_the_tokens_decode_to_the_text_document_by_document(texts: Path, prepared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    documents: list[list[int]] = [[]]
    for token in stream_of_tokens(prepared):
        if token == tokenizer.token_to_id(END_OF_TEXT):
            documents.append([])
        else:
            documents[-1].append(token)
    decoded = [tokenizer.decode(document) for document in documents[:-1]]
    plain = [(texts / name).read_text() for name in ("a.txt", "b.md")]
    assert decoded == plain + [f"document {number}\n" for number in range(30)]
    assert documents[-1] == []


def test_shards_have_the_size_that_was_asked_for(prepared: Path) -> None:
    manifest = read_manifest(prepared)
    assert {shard.tokens for shard in manifest.shards[:-1]} == {500}
    assert manifest.tokens == len(stream_of_tokens(prepared))
    assert manifest.documents == 32


def test_the_same_text_gives_the_same_corpus(texts: Path, prepared: Path, tmp_path: Path) -> None:
    again = prepare([texts], tmp_path / "again", vocabulary=400, shard_tokens=500)
    assert again == read_manifest(prepared)


def test_a_given_tokenizer_is_used_and_its_fingerprint_kept(
    texts: Path, prepared: Path, tmp_path: Path
) -> None:
    own = prepared / "tokenizer.json"
    manifest = prepare([texts / "a.txt"], tmp_path / "more", tokenizer=own)
    assert manifest.tokenizer == read_manifest(prepared).tokenizer
    assert manifest.vocabulary == read_manifest(prepared).vocabulary


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"\xff\xfe not text", "x.txt", "not UTF-8"),
        (b'{"body": "no text"}\n', "x.jsonl", "line 1"),
        (b"not json\n", "x.jsonl", "line 1"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_left(
    content: bytes, name: str, words: str, tmp_path: Path
) -> None:
    source = tmp_path / "in" / name
    source.parent.mkdir()
    source.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        prepare([source], tmp_path / "out" / "corpus")
    assert list((tmp_path / "out").glob("*")) == []


def test_an_existing_output_is_never_written_into(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        prepare([texts], tmp_path)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"no \.txt"):
        prepare([tmp_path / "in"], tmp_path / "out")


def test_the_mini_corpus_is_what_its_text_gives(tmp_path: Path) -> None:
    generate(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (MINI / file.name).read_bytes(), "run make generate"


def test_neighbouring_samples_share_one_token(prepared: Path) -> None:
    corpus = Corpus(prepared, sequence_length=32)
    tokens = stream_of_tokens(prepared)
    for index in range(corpus.samples):  # across the borders of shards too
        assert corpus.sample(index).tolist() == tokens[index * 32 : index * 32 + 33]
    assert corpus.samples == (len(tokens) - 1) // 32


def test_a_shard_of_another_size_is_refused(texts: Path, tmp_path: Path) -> None:
    prepare([texts], tmp_path / "corpus", vocabulary=400)
    shard = tmp_path / "corpus" / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match="copy or prepare the corpus again"):
        Corpus(tmp_path / "corpus", 32)


def test_an_edited_manifest_is_refused(texts: Path, tmp_path: Path) -> None:
    prepare([texts], tmp_path / "corpus", vocabulary=400)
    path = tmp_path / "corpus" / "manifest.json"
    path.write_text(path.read_text().replace('"dtype": "<u2"', '"dtype": "<u4"'))
    with pytest.raises(ValueError, match="fingerprint"):
        read_manifest(tmp_path / "corpus")


def test_a_corpus_of_another_tokenizer_is_refused(prepared: Path) -> None:
    with pytest.raises(ValueError, match=r"another tokenizer than data\.tokenizer"):
        open_corpora(
            [prepared.as_uri()], tokenizer="builtin://mini", vocabulary=1024, sequence_length=32
        )


def test_a_vocabulary_larger_than_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.overrides\.vocabulary"):
        open_corpora(
            ["builtin://mini"], tokenizer="builtin://mini", vocabulary=512, sequence_length=32
        )


@pytest.mark.parametrize("uri", ["builtin://none", "pvc://claim/corpus", "s3://bucket"])
def test_only_files_and_built_in_corpora_are_read(uri: str) -> None:
    with pytest.raises(ValueError, match=uri):
        resolve(uri)


def test_a_file_uri_is_a_path() -> None:
    assert resolve("file:///data/my%20corpus") == Path("/data/my corpus")
    assert resolve("builtin://mini") == BUILTIN / "mini"


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=st.text(max_size=5))
def test_a_permutation_meets_every_index_once(size: int, key: str) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permutations_of_two_keys_differ() -> None:
    one, two = ([permute(index, 1000, key) for index in range(1000)] for key in ("a", "b"))
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 10
    assert sum(abs(a - b) < 50 for a, b in pairwise(one)) < 200


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=64))
def test_shares_fill_a_block_and_follow_the_weights(weights: list[float]) -> None:
    counts = shares(weights)
    assert sum(counts) == BLOCK
    assert min(counts) >= 1
    for weight, count in zip(weights, counts, strict=True):
        assert count <= weight / sum(weights) * BLOCK + 1


@pytest.fixture(scope="module")
def mini() -> Corpus:
    return Corpus(MINI, sequence_length=1000)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_of_one_source_reads_every_sample_once(
    mini: Corpus, seed: int, epoch: int
) -> None:
    stream = Stream([mini], [1.0], seed)
    begin = epoch * stream.samples_per_epoch
    places = [stream.locate(begin + offset) for offset in range(stream.samples_per_epoch)]
    assert sorted(places) == [(0, index) for index in range(mini.samples)]


def test_a_mixture_has_the_weights_in_every_block(mini: Corpus) -> None:
    stream = Stream([mini, mini], [3.0, 1.0], seed=7)
    for block in (0, 5):
        sources = [stream.locate(block * BLOCK + offset)[0] for offset in range(BLOCK)]
        assert sources.count(0) == 3 * BLOCK // 4


def test_every_source_of_a_mixture_is_read_through_before_it_is_read_again(mini: Corpus) -> None:
    stream = Stream([mini, mini], [3.0, 1.0], seed=7)
    places = [stream.locate(position) for position in range(BLOCK)]
    for source, turns in ((0, 3 * BLOCK // 4), (1, BLOCK // 4)):
        counts = np.bincount([i for s, i in places if s == source], minlength=mini.samples)
        assert counts.min() >= turns // mini.samples
        assert counts.max() <= -(-turns // mini.samples)


@settings(deadline=None)
@given(position=st.integers(0, 10**12))
def test_a_position_survives_its_state(mini: Corpus, position: int) -> None:
    stream = Stream([mini], [1.0], 1)
    state = stream.state(position)
    assert 0 <= state.cursor < stream.samples_per_epoch
    assert stream.position(state) == position


def test_reading_in_parts_gives_what_reading_at_once_gives(mini: Corpus) -> None:
    stream = Stream([mini], [1.0], 1)
    at_once = stream.read(100, 112)
    for ranks in (1, 2, 3, 4, 6):
        share = 12 // ranks
        parts = [stream.read(100 + r * share, 100 + (r + 1) * share) for r in range(ranks)]
        assert (np.concatenate(parts) == at_once).all()
