"""The page to watch a game: what it holds, what hostile texts cannot do in it, its controls."""
import json
import re
import shutil
import subprocess

import pytest

from evals.page import page
from plumbing.files import InputError

HOSTILE = ['</script><script>document.title = "broken"</script>',
           '<img src=x onerror=\'document.title = "broken"\'>', "<!--", "]]>",
           "\u2028`${1}`", "{DATA}"]


def write_run(folder, algo="lsp", steps=3, queries=2,
              answer=lambda step, n, g: f"answer {step} {n} {g}"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"algo": algo}))
    metrics = [{"step": step, "reward": step / 10, "quality": None, "kl_solver": 0.1 * step}
               for step in range(1, steps + 1)]
    samples = [{"step": step, "query": f"query {n} of step {step}", "gold": None, "kind": None,
                "query_stopped": True, "trained_on": True, "challenger_advantage": float(n),
                "answers": [{"answer": answer(step, n, g), "stopped": True, "reward": float(g),
                             "quality": 7.0, "advantage": g - 0.5, "judgement": "<Score>7</Score>",
                             "reason": None} for g in range(2)]}
               for step in range(1, steps + 1) for n in range(queries)]
    evals = [{"step": 0, "accuracy": {"carry": 0.1}, "challenger": {"none": 0.9, "malformed": 0.1}}]
    for name, records in (("metrics", metrics), ("samples", samples), ("eval", evals)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def data_of(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_holds_both_runs_and_nothing_from_the_network(tmp_path):
    text = page([write_run(tmp_path / "A"), write_run(tmp_path / "B", "lsp-zero")])
    a, b = data_of(text)["runs"]
    assert (a["name"], a["algo"], b["algo"]) == ("A", "lsp", "lsp-zero")
    assert a["metrics"]["reward"] == [0.1, 0.2, 0.3] and list(a["samples"]) == ["1", "2", "3"]
    assert a["samples"]["2"][1]["answers"][1]["reward"] == 1.0
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(""", text)
    assert "default-src 'none'" in text


def test_hostile_texts_stay_inside_the_data(tmp_path):
    text = page([write_run(tmp_path / "A", answer=lambda step, n, g: HOSTILE[(2 * n + g) % 6])])
    plain = page([write_run(tmp_path / "B")])
    assert text.count("<") == plain.count("<")                  # no text opens an element
    assert data_of(text)["runs"][0]["samples"]["1"][0]["answers"][0]["answer"] == HOSTILE[0]


def test_samples_are_thinned_to_the_size_and_the_page_says_so(tmp_path):
    run = write_run(tmp_path / "A", steps=40, answer=lambda *_: "long " * 200)
    text = page([run], most=60_000)
    found = data_of(text)
    kept = list(map(int, found["runs"][0]["samples"]))
    assert len(text.encode()) <= 60_000 and 3 < len(kept) < 40 and kept[-1] == 40
    assert re.match(r"Samples of every \d+th step are shown", found["note"])
    assert len(found["runs"][0]["metrics"]["step"]) == 40       # the curves are whole


def test_a_folder_without_a_recorded_step_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        page([tmp_path])
    run = write_run(tmp_path / "A", steps=0)
    with pytest.raises(InputError, match="metrics.jsonl: no step has been recorded yet"):
        page([run])


BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
BROWSER = next(filter(None, BROWSERS), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser_the_slider_the_sorting_and_the_guess_button_work_and_no_text_runs(tmp_path):
    """A driver script at the page's end uses the controls and writes what it sees."""
    hostile = write_run(tmp_path / "A", answer=lambda step, n, g: HOSTILE[(2 * n + g) % 6])
    driver = """<script>
        const seen = [], queries = () => [...document.querySelectorAll(".query")].map(
            (card) => card.querySelector(".said").textContent);
        seen.push(queries());
        slider.value = 2; slider.dispatchEvent(new Event("input"));
        seen.push(queries());
        const sort = document.getElementById("sort");
        sort.value = "challenger_advantage"; sort.dispatchEvent(new Event("change"));
        seen.push(queries());
        document.getElementById("guess").click();
        seen.push(getComputedStyle(document.querySelector("td.secret")).visibility);
        seen.push(document.title, document.querySelectorAll("img").length);
        const answer = document.createElement("pre"); answer.id = "seen";
        answer.textContent = JSON.stringify(seen); document.body.append(answer);
        </script></body>"""
    file = tmp_path / "game.html"
    file.write_text(page([hostile]).replace("</body>", driver), encoding="utf-8")
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()],
                          capture_output=True, text=True, timeout=60)
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    assert seen[0] == ["query 0 of step 1", "query 1 of step 1"]
    assert seen[1] == ["query 0 of step 3", "query 1 of step 3"]
    assert seen[2] == ["query 1 of step 3", "query 0 of step 3"]
    assert seen[3:] == ["hidden", "The game", 0]
