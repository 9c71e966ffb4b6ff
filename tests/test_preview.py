"""The preview shows what is trained on, token for token; nothing in the data can change the page or the terminal."""

import contextlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import preview
import pytest
import trl
from conftest import settings, write_jsonl

from open_r1.chat import get_tokenizer
from open_r1.preparation import prepare
from open_r1.recipe import load_recipe
from open_r1.sft import build_configs
from open_r1.views import Token, pick

QUESTION = "<script>alert(1)</script> \x1b[2J \u202e 四 \U0001f600?"
ANSWER = '<think>\nwhy\n</think>\n\n"><img onerror=alert(2)> &lt; 四\n\n  \x1b[31mred'
TRACE = "<think>\none and {n}\n</think>\n\n{n} plus one"


class Page(HTMLParser):
    """What a browser makes of the page: its tags, attributes, titles of samples, and the tokens of each sample."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.titles, self.samples, self.cells, self.bars = set(), set(), [], [], [], []
        self.inside = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        attributes = dict(attributes)
        if tag not in ("meta", "link", "br", "img"):
            self.inside.append(tag)
        if tag == "pre":
            self.samples.append([])
        elif tag == "span" and "pre" in self.inside:
            token, position = map(int, re.fullmatch(r"id (\d+), position (\d+)", attributes["title"]).groups())
            self.samples[-1].append([token, position, "said" in attributes["class"].split(), ""])
        elif tag == "div" and attributes.get("class") == "bars":
            self.bars.append([])
        elif tag == "span" and "tokens: " in attributes.get("title", ""):
            self.bars[-1].append(int(attributes["title"].split()[-2]))
        elif tag == "h3":
            self.titles.append("")
        elif tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, text):
        if "pre" in self.inside:
            assert "span" in self.inside, f"{text!r} stands between tokens"
            self.samples[-1][-1][-1] += text
        elif "h3" in self.inside:
            self.titles[-1] += text
        elif self.inside[-1:] in (["td"], ["th"]):
            self.cells[-1][-1] += text


@pytest.fixture(scope="module")
def argv(tmp_path_factory, tiny_model, chat_file):
    """The command line of a two-source mixture: answers that are cut, turns that are rewritten, hostile contents."""
    turns = [("user", QUESTION), ("assistant", ANSWER)]
    rows = [turns] + [
        [("user", f"{n}?"), ("assistant", TRACE.format(n=n)), ("user", "Sure?"), ("assistant", "Yes.")]
        for n in range(20)
    ]
    messages = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
    second = write_jsonl(tmp_path_factory.mktemp("second") / "hostile<b>.jsonl", messages)
    return settings(
        model_name_or_path=tiny_model,
        chat_template=str(Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"),
        dataset_mixture={"datasets": [{"id": chat_file}, {"id": second, "weight": 1.5}]},
        max_length=160,
        packing=True,
        output_dir="unused",
    )


@pytest.fixture(scope="module")
def show(argv, tmp_path_factory):
    """Run the preview; returns the terminal's text and the page."""

    def show(*more):
        path = tmp_path_factory.mktemp("page") / "new" / "preview.html"
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert preview.main([*argv, "--html", str(path), "--samples", "5", *more]) == 0
        return said.getvalue(), path.read_text(encoding="utf-8")

    return show


@pytest.fixture(scope="module")
def coloured(show):
    return show("--color", "always")


@pytest.fixture(scope="module")
def trained(argv):
    """The prepared training part and its tokenizer, straight from the preparation."""
    script_args, args, model_args = build_configs(load_recipe(argv))
    tokenizer = get_tokenizer(model_args, args)
    return prepare(script_args, args, tokenizer).train, tokenizer


def shown_text(text):
    """Control characters as code points, everything else as it is."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", lambda c: f"<U+{ord(c[0]):04X}>", text)


def test_every_token_of_a_sample_once_with_its_id_and_class(coloured, trained):
    page, (part, tokenizer) = Page(coloured[1]), trained
    rows = {(row["source"], tuple(row["input_ids"]), tuple(row["labels"])) for row in part.unpacked}
    assert len(page.samples) == 10
    for number, tokens in enumerate(page.samples):
        ids, positions, supervised, texts = zip(*tokens, strict=True)
        labels = tuple(token if said else -100 for token, said in zip(ids, supervised, strict=True))
        assert (number // 5, ids, labels) in rows
        assert positions == tuple(range(len(ids)))
        assert "".join(texts) == shown_text(tokenizer.decode(ids))
        count = sum(said for said in supervised[1:])
        assert f", {len(ids)} tokens, {count} supervised" in page.titles[number]


def test_supervised_is_what_the_assistant_said(coloured, trained):
    page, (_, tokenizer) = Page(coloured[1]), trained
    answers = [tokenizer.decode([token for token, _, said, _ in tokens if said]) for tokens in page.samples]
    titles = page.titles[5:10]
    assert titles[0].startswith("row 0, ") and answers[5] == ANSWER + "<|im_end|>"
    assert titles[1].startswith("row 1, ") and titles[1].endswith("; 1 of 2 made of this row")
    assert titles[2].startswith("row 1, ") and titles[2].endswith("; 2 of 2 made of this row")
    assert answers[6:8] == [TRACE.format(n=0) + "<|im_end|>", "Yes.<|im_end|>"]
    assert any("; tokens cut off: " in title for title in page.titles[:5])


def test_nothing_in_the_data_becomes_markup(coloured):
    page = Page(coloured[1])
    known = "html head meta title style body h1 h2 h3 p span u pre div table thead tbody tr th td"
    assert page.tags == set(known.split())
    assert not page.attributes & {"src", "href"} and not any(name.startswith("on") for name in page.attributes)
    assert "url(" not in coloured[1] and "@import" not in coloured[1]
    hostile = "".join(text for *_, text in page.samples[5])
    assert "<script>alert(1)</script> <U+001B>[2J <U+202E> 四 \U0001f600?" in hostile
    assert '"><img onerror=alert(2)> &lt; 四\n\n  <U+001B>[31mred' in hostile
    assert any("hostile<b>.jsonl" in cell for cell in page.cells[0])


def test_ledger_and_lengths_add_up(coloured, trained):
    page, ledger = Page(coloured[1]), trained[0].ledger
    cells = {line[0]: line[1:] for line in page.cells}
    entries = [*ledger["sources"], ledger["total"]]
    for key in ("rows_in", "expanded", "split", "trained", "truncated", "tokens", "supervised", "answers"):
        assert cells[key.replace("_", " ")] == [f"{entry[key]:,}" for entry in entries]
    assert cells["lost ends"] == [f"{entry['lost_end']:,}" for entry in entries]
    assert cells["length p90"] == [f"{entry['lengths']['p90']:,}" for entry in entries]
    assert cells["packing efficiency"] == ["", "", f"{ledger['total']['packing_efficiency']:.1%}"]
    assert [sum(bars) for bars in page.bars] == [entry["trained"] for entry in ledger["sources"]]
    assert ledger["total"]["expanded"] > 0 and ledger["total"]["truncated"] > 0


def test_terminal_colours_what_is_supervised(coloured):
    text = coloured[0]
    assert "\x1b[32mYes.<|im_end|>\x1b[0m" in text
    assert '\x1b[32m"><img onerror=alert(2)> &lt; 四\x1b[0m\n\n\x1b[32m  <U+001B>[31mred<|im_end|>\x1b[0m' in text
    assert "\x1b[2mSure?<|im_end|>\x1b[0m" in text
    assert set(re.findall(r"\x1b[^m]*m?", text)) == {"\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"}
    assert re.search(r"== .*chat\.jsonl:train, row 0, \d+ tokens, \d+ supervised", text)


def test_terminal_is_plain_text_without_colour(show, coloured):
    plain = show("--color", "never")[0]
    assert "\x1b" not in plain
    stripped = re.sub(r"\x1b\[\d+m", "", coloured[0])
    assert plain.splitlines()[:-1] == stripped.splitlines()[:-1]  # the last line names the page
    assert show()[0].splitlines()[:-1] == plain.splitlines()[:-1]


def test_the_middle_of_a_long_sample_is_left_to_the_page():
    tokens = [Token(n, f"{n} ", n > 5) for n in range(4000)]
    text = preview.painted(tokens, color=False)
    assert text.startswith("0 1 ") and text.endswith(" 3999 ")
    assert "[... 2,500 tokens that the page shows ...]" in text and " 2000 " not in text


@pytest.mark.parametrize(
    ("kept", "cut", "several", "count", "expected"),
    [
        ([], [], [], 3, []),
        ([4], [4], [], 3, [4]),
        (range(100), [], [], 3, [0, 33, 66]),
        (range(100), [70, 80], [90, 91, 95], 3, [0, 70, 90]),
        (range(100), [70], [90, 91], 5, [0, 50, 70, 90, 91]),
        (range(3), [1], [], 9, [0, 1, 2]),
        (range(9), [5], [], 1, [0]),
    ],
)
def test_which_rows_are_picked(kept, cut, several, count, expected):
    kept = np.array(kept, dtype=np.int64)
    assert pick(kept, np.isin(kept, cut), np.isin(kept, several), count) == expected


def test_a_mistake_in_the_recipe_is_said_in_a_line(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert preview.main(["--config", str(tmp_path / "none.yaml"), "--html", str(page)]) == 2
    assert "none.yaml: cannot read this recipe" in capsys.readouterr().err
    assert not page.exists()
