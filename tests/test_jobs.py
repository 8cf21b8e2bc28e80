"""What jobs read, how they cut, and what they write."""

import json
import re
from pathlib import Path

import pytest

from offload_runtime.errors import UserError
from offload_runtime.jobs import DocumentError, Job, find_documents, load_template, run_job
from offload_runtime.jobs.documents import take_shard
from offload_runtime.jobs.job import parse_shard
from offload_runtime.jobs.prompts import built_in, parse_template
from offload_runtime.jobs.readers import read_file
from offload_runtime.jobs.splitting import ELLIPSIS, shorten, split
from offload_runtime.jobs.worker import Worker

from .jobs_fake import CTX, NEW_TOKENS, FakeModel, make_job

WORDS = "one two three four five six seven eight nine ten"


def words(text: str) -> int:
    return len(text.split())


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text().split("\n")[:-1]]


def test_a_folder_is_searched_and_hidden_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "sub/a.md", ".git/c.txt", ".d.txt", "e.bin", "f.jsonl"):
        (tmp_path / name).write_text("text")
    assert [source.id for source in find_documents(str(tmp_path))] == ["b.txt", "sub/a.md"]
    pattern = str(tmp_path / "**" / "*.md")
    assert [source.id for source in find_documents(pattern)] == ["sub/a.md"]
    assert [source.id for source in find_documents(str(tmp_path / "b.txt"))] == ["b.txt"]


def test_a_job_does_not_read_what_it_writes(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": "a", "text": "one"}\n')
    pattern, output = str(tmp_path / "*.json*"), tmp_path / "out.jsonl"
    assert run_job(make_job(pattern, output), FakeModel()).documents == 1
    again = run_job(make_job(pattern, output), FakeModel())
    assert (again.documents, again.left) == (1, 0)
    with pytest.raises(UserError, match="is the input"):
        run_job(make_job(tmp_path / "in.jsonl", tmp_path / "in.jsonl"), FakeModel())


def test_no_documents_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no documents"):
        find_documents(str(tmp_path))
    with pytest.raises(UserError, match="no file or folder"):
        find_documents(str(tmp_path / "nothing"))


def test_jsonl_fields_and_ids(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"id": 7, "body": "one"}\n\n{"body": "two"}\nnot json\n{"id": "x", "body": 3}\n')
    sources = find_documents(str(file), text_field="body")
    assert [source.id for source in sources] == ["7", "line-3", "line-4", "x"]
    assert [sources[0].read(), sources[1].read()] == ["one", "two"]
    with pytest.raises(DocumentError, match=r"line 4 of .* is no JSON"):
        sources[2].read()
    with pytest.raises(DocumentError, match="no text in field 'body'"):
        sources[3].read()
    with pytest.raises(UserError, match="line 3 of .* has no id in field 'id'"):  # noqa: RUF043
        find_documents(str(file), id_field="id")


def test_ids_must_be_unique(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"id": "a", "text": "1"}\n{"id": "a", "text": "2"}\n')
    with pytest.raises(UserError, match="two documents have the id 'a'"):
        find_documents(str(file))


def test_html(tmp_path: Path) -> None:
    pytest.importorskip("bs4", reason="the extra `docs` is not installed")
    file = tmp_path / "page.html"
    file.write_text(
        "<html><head><title>T</title><style>x{}</style></head><body><h1>A  head</h1><script>var x</script>"
        "<p>First\n<b>bold</b> text.</p><p>Second<br>line</p><ul><li>item</li></ul></body></html>"
    )
    assert read_file(file) == "A head\n\nFirst bold text.\n\nSecond\nline\n\nitem"


def test_docx(tmp_path: Path) -> None:
    docx = pytest.importorskip("docx", reason="the extra `docs` is not installed")
    document = docx.Document()
    document.add_heading("A head")
    document.add_paragraph("First.")
    table = document.add_table(rows=1, cols=2)
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    document.add_paragraph("Last.")
    document.save(str(tmp_path / "a.docx"))
    assert read_file(tmp_path / "a.docx") == "A head\n\nFirst.\n\nleft\tright\n\nLast."


def write_pdf(file: Path, text: str) -> None:
    """A PDF of one page with one line of text, by hand: readers are not writers."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
    font = "<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    bodies = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources {font} >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
    ]
    data, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    data += f"xref\n0 5\n0000000000 65535 f \n{table}trailer\n<< /Size 5 /Root 1 0 R >>\n"
    file.write_text(data + f"startxref\n{data.index('xref')}\n%%EOF\n")


def test_pdf(tmp_path: Path) -> None:
    pytest.importorskip("pypdf", reason="the extra `docs` is not installed")
    write_pdf(tmp_path / "a.pdf", "Text of a page")
    assert read_file(tmp_path / "a.pdf") == "Text of a page"
    write_pdf(tmp_path / "scan.pdf", "")
    with pytest.raises(DocumentError, match="no text layer"):
        read_file(tmp_path / "scan.pdf")


@pytest.mark.parametrize(("suffix", "library"), [("pdf", "pypdf"), ("docx", "docx")])
def test_damaged_files_are_one_line(tmp_path: Path, suffix: str, library: str) -> None:
    pytest.importorskip(library, reason="the extra `docs` is not installed")
    file = tmp_path / f"bad.{suffix}"
    file.write_bytes(b"%PDF-1.4 and then nothing of the kind")
    with pytest.raises(DocumentError, match=f"is no readable {suffix.upper()} file") as caught:
        read_file(file)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_said_before_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    monkeypatch.setattr("offload_runtime.jobs.readers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("pip install 'ds-offload[docs]'")):
        find_documents(str(tmp_path))


@pytest.mark.parametrize("room", [11, 40, 97])
@pytest.mark.parametrize("joint", ["\n\n", "\n", ". ", " "])
def test_split_keeps_every_word_and_the_room(room: int, joint: str) -> None:
    text = joint.join(f"{i} {WORDS}" for i in range(50))
    parts = split(text, words, room)
    assert max(map(words, parts)) <= room
    joined = "".join("".join(parts).split())
    assert joined == "".join(text.split())


def test_split_cuts_between_paragraphs() -> None:
    text = "\n\n".join(f"{i} {WORDS}. {WORDS}." for i in range(40))
    parts = split(text, words, 200)
    assert len(parts) == 5
    assert all(part.split()[0].isdigit() and part.endswith("ten.") for part in parts)


def test_split_of_uneven_text() -> None:
    """The first half has ten times the tokens a character of the second."""
    text = "a " * 5000 + "abcdefghijklmnopqrst " * 500
    parts = split(text, words, 500)
    assert max(map(words, parts)) <= 500
    assert sum(map(words, parts)) == 5500
    assert len(parts) < 30


def test_split_gives_up_on_what_cannot_fit() -> None:
    with pytest.raises(DocumentError, match="raise --ctx"):
        split("word " * 20, lambda text: 1000, 10)


@pytest.mark.parametrize("part", ["head", "tail", "middle"])
@pytest.mark.parametrize("room", [20, 100, 487])
def test_shorten(part: str, room: int) -> None:
    text = " ".join(map(str, range(500)))
    kept = shorten(text, part, words, room)
    assert 0.8 * room <= words(kept) <= room
    assert (kept.split()[0] == "0") == (part != "head")
    assert (kept.split()[-1] == "499") == (part != "tail")
    assert (ELLIPSIS in kept) == (part == "middle")
    assert set(kept.replace(ELLIPSIS, " ").split()) <= set(text.split())  # no word is cut in two


def test_templates() -> None:
    assert built_in() == ["combine", "summarize"]
    template = load_template("summarize")
    assert "{document}" not in template.fill("x {y} {document}"[:5])
    assert template.fill("{x}").count("{x}") == 1
    with pytest.raises(UserError, match="2 times"):
        parse_template("{document} {document}", "t")
    with pytest.raises(UserError, match="the built-in templates are combine, summarize"):
        load_template("nothing")


def test_shards_part_the_documents(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text("text")
    sources = find_documents(str(tmp_path))
    parts = [take_shard(sources, i, 3) for i in (1, 2, 3)]
    found = [source.id for part in parts for source in part]
    assert sorted(found) == sorted(source.id for source in sources)
    assert all(parts)
    (tmp_path / "new.txt").write_text("text")
    more = take_shard(find_documents(str(tmp_path)), 2, 3)
    assert {s.id for s in parts[1]} == {s.id for s in more} - {"new.txt"}
    assert parse_shard("2/8") == (2, 8)
    for wrong in ("0/8", "9/8", "2", "a/b"):
        with pytest.raises(UserError, match="--shard"):
            parse_shard(wrong)


def test_shard_output_name(tmp_path: Path) -> None:
    job = make_job(tmp_path, tmp_path / "out.jsonl", shard=(2, 8))
    assert job.output_file == tmp_path / "out.2-of-8.jsonl"


@pytest.mark.parametrize("long", ["refuse", "cut-head", "cut-tail", "cut-middle", "map-reduce"])
@pytest.mark.parametrize("places", [1, 3])
def test_documents_longer_than_ctx(tmp_path: Path, long: str, places: int) -> None:
    source = tmp_path / "in.jsonl"
    texts = {"short": WORDS, "long": f"{WORDS}.\n\n" * 90, "last": WORDS}
    source.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in texts.items()))
    output = tmp_path / "out.jsonl"
    model = FakeModel(places=places)
    run_job(make_job(source, output, long=long), model)
    short, cut, last = sorted(records(output), key=lambda record: list(texts).index(record["id"]))
    assert short["fitted"] == {"method": "whole", "document_tokens": 10, "kept_tokens": 10}
    assert last["error"] is None
    if long == "refuse":
        assert cut["error"].startswith("it has 900 tokens and --ctx 200 leaves room for 173")
        return
    assert cut["fitted"]["method"] == long
    assert cut["fitted"]["document_tokens"] == 900
    if long == "map-reduce":
        assert cut["fitted"]["pieces"] == 6
        assert cut["fitted"]["rounds"] == 1
        assert cut["prompt_tokens"] > 900  # the pieces, their prompts, and the summaries once more
        assert cut["new_tokens"] == 3 * 7
    else:
        assert 150 < cut["fitted"]["kept_tokens"] <= 173
        assert cut["prompt_tokens"] <= CTX - NEW_TOKENS


def test_summaries_too_long_for_one_prompt_are_summarised_again(tmp_path: Path) -> None:
    source = tmp_path / "book.txt"
    source.write_text(f"{WORDS}.\n\n" * 1400)
    output = tmp_path / "out.jsonl"
    run_job(make_job(source, output, long="map-reduce"), FakeModel())
    fitted = records(output)[0]["fitted"]
    assert fitted["pieces"] > 60  # 3 words each are more than the 180 of a prompt
    assert fitted["rounds"] == 2


def test_a_line_has_every_figure(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS)
    run_job(make_job(tmp_path, tmp_path / "out.jsonl"), FakeModel())
    record = records(tmp_path / "out.jsonl")[0]
    assert list(record) == [
        "id", "text", "finish_reason", "prompt_tokens", "new_tokens", "ttft_s", "tpot_s", "hit_rate",
        "gather_gb", "seconds", "fitted", "error",
    ]  # fmt: skip
    assert record["text"].endswith("words\u2028é")  # a line separator of Unicode does not end a line
    assert (record["prompt_tokens"], record["new_tokens"]) == (17, 3)
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert meta["settings"]["prompt_template"] == "Say what this is : {document} End ."


def test_settings_are_checked(tmp_path: Path) -> None:
    for wrong in ({"long": "burn"}, {"max_new_tokens": 0}, {"max_errors": -1}, {"ctx": 70}):
        with pytest.raises(UserError, match="--"):
            make_job(tmp_path, tmp_path / "out.jsonl", **wrong)


def test_metrics(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")
    from urllib.request import urlopen

    from offload_runtime.jobs.metrics import Metrics

    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "b.txt").write_text("")
    metrics = Metrics(0)
    port = metrics.server.server_address[1]
    try:
        run_job(make_job(tmp_path, tmp_path / "out.jsonl"), FakeModel(), [metrics])
        page = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        with pytest.raises(UserError, match="cannot be used"):
            Metrics(port)
    finally:
        metrics.close()
    assert 'ds_offload_documents_total{outcome="ok"} 1.0' in page
    assert 'ds_offload_documents_total{outcome="error"} 1.0' in page
    assert 'ds_offload_tokens_total{kind="prompt"} 17.0' in page
    assert "ds_offload_gathered_bytes_total 1e+09" in page


def test_a_document_waits_for_a_place_of_its_size(tmp_path: Path) -> None:
    """Nothing fails and nothing is left out, whatever the order of lengths; the answers are the same."""
    source, lengths = tmp_path / "in.jsonl", [9, 2, 40, 41, 3, 42, 1, 38, 39, 2, 2, 5]
    rows = [json.dumps({"id": f"d{i}", "text": "word " * n}) + "\n" for i, n in enumerate(lengths)]
    source.write_text("".join(rows))
    texts = []
    for name, sizes in (("equal", ()), ("sized", (80, 40, 40))):
        output, model = tmp_path / f"{name}.jsonl", FakeModel(places=3, sizes=sizes)
        run_job(make_job(source, output, long="refuse"), model)
        lines = [json.loads(line) for line in output.read_bytes().split(b"\n") if line]
        texts.append(sorted((line["id"], line["text"]) for line in lines if "text" in line))
        assert not any(line.get("error") for line in lines)
        assert model.most > 1
    assert texts[0] == texts[1]


def lengths_job(tmp_path: Path, lengths: list[int]) -> Job:
    """Documents d0, d1, ... of so many words; prompt and answer add 27 tokens."""
    source = tmp_path / "in.jsonl"
    rows = [json.dumps({"id": f"d{i}", "text": "word " * n}) + "\n" for i, n in enumerate(lengths)]
    source.write_text("".join(rows))
    return make_job(source, tmp_path / "out.jsonl", long="refuse")


def starts(model: FakeModel) -> list[int]:
    """Words of the documents that the model takes up from now on."""
    seen, plain = [], model.start

    def start(key, prompt, *rest):
        seen.append(prompt.count("word"))
        plain(key, prompt, *rest)

    model.start = start  # type: ignore[method-assign]
    return seen


def test_a_document_without_a_place_is_overtaken_by_the_next_few(tmp_path: Path) -> None:
    """Two long ones want the long place; short ones go by meanwhile, no more of them than are looked at."""
    lengths = [60, 61, 1, 2, 3, 62, 4, 5]
    model = FakeModel(places=2, sizes=(100, 40))
    seen = starts(model)
    job = lengths_job(tmp_path, lengths)
    assert run_job(job, model).written == len(lengths)
    assert sorted(seen) == sorted(lengths)
    assert seen[:2] == [60, 1]  # 61 finds no place
    assert seen.index(61) < seen.index(62)
    alike = FakeModel(places=2)
    ordered = starts(alike)
    again = tmp_path / "again"
    again.mkdir()
    run_job(lengths_job(again, lengths), alike)
    assert ordered == lengths


def test_documents_that_were_only_read_are_left_when_the_job_is_to_stop(tmp_path: Path) -> None:
    job = lengths_job(tmp_path, [60, 61, 62, 1])
    model, asked = FakeModel(places=2, sizes=(100, 40)), []
    worker = Worker(job, model, lambda *_: None, lambda: bool(asked))
    sources = find_documents(job.input)
    done = []
    for outcome in worker.work(sources):
        done.append(outcome.record["id"])
        asked.append(True)
    assert sorted(done) == ["d0", "d3"]  # d3 went by d1 and d2, which nobody had started
    assert not worker.open
    assert not worker.waiting
    summary = run_job(job, FakeModel(places=2, sizes=(100, 40)))
    assert (summary.documents, summary.left) == (4, 0)
