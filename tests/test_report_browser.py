"""The report page in a real browser: what is drawn, what the filters leave, links, keys, and that no text of a run acts.

Runs where Chromium and its driver are on the PATH; `.ci/run` installs them where it can.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.browser import chromium, open_browser, open_page
from benchmarks.report_page import make_run
from ludic.report.page import write_report
from ludic.report.start import write_start
from ludic.storage.jsonl import read_jsonl
from ludic.train.advantages import group_advantages
from tests.test_report import HOSTILE, completion, problem, write_lines

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [
    pytest.mark.skipif(chromium() is None, reason="needs chromium and chromedriver on the PATH"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium leaves its sockets to the garbage collector
]


@pytest.fixture(scope="module")
def browser() -> Iterator["Chrome"]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings, whose first rollouts are hostile text, and an evaluation of four samples a problem."""
    folder = tmp_path_factory.mktemp("report")
    for number, name in enumerate(("first", "second")):
        run = make_run(folder / name, 1024, seed=number)
        write_start(
            run / "sums_train_start.json", command=f"train {HOSTILE}", settings={"seed": number, "model": HOSTILE}
        )
    rollouts = folder / "first" / "sums_train_rollouts.jsonl"
    rows = read_jsonl(rollouts)
    for row in rows[:8]:
        row.update(prompt=HOSTILE, completion=HOSTILE, target="<b>7</b>", answer=HOSTILE)
    for row in rows[-16:]:  # the last group was trained on, the one before was not
        row.update(completion="<b>≠🙂 \\boxed{7}", completion_token_ends=[3, 3, 4, 5, 16, 16], advantage=0.25,
                   completion_logprobs=[-0.5, -9.0, -2.0, 0.0, -0.1, -0.2])  # fmt: skip
    write_lines(rollouts, rows)
    gaps = {"completion_logprob_gaps": [0.02, -0.01, None, 0.0, 0.005, -0.02]}
    write_lines(folder / "first" / "sums_train_token_gaps.jsonl",
                [{name: row[name] for name in ("step", "group", "rollout")} | gaps for row in rows[-8:]])  # fmt: skip
    with (folder / "first" / "sums_train_metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "time": 0.0, "event": f"update 3 was skipped: {HOSTILE}"}) + "\n")
    right, wrong = completion("7", True), completion("3", False)
    problems = [problem(0, right, wrong, wrong, completion(None, False)), problem(1, right, right, right, right)]
    write_lines(folder / "first" / "sums_eval.jsonl", problems)
    write_report([folder / "first", folder / "second"], folder / "page.html")
    return folder / "page.html"


def ask(browser: "Chrome", program: str, *values: Any) -> Any:
    """The value of a program's `return` in the page."""
    return browser.execute_script(program, *values)


def wait_for(browser: "Chrome", condition: str) -> None:
    """Until an expression is true in the page."""
    program = "const done = arguments[0]; const look = () => ((CONDITION) ? done() : setTimeout(look, 10)); look();"
    browser.execute_async_script(program.replace("CONDITION", condition))


def press(browser: "Chrome", key: str) -> None:
    ask(browser, "window.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))", key)


def complaints(browser: "Chrome") -> list[str]:
    """Errors and warnings on the console since the last look; a request that the page's policy refuses is one."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]  # type: ignore[no-untyped-call]


def requests(browser: "Chrome") -> list[str]:
    """What was asked for since the last look."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]  # type: ignore[no-untyped-call]
    return [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]


INKED = """
const painted = (canvas) => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let place = 3; place < data.length; place += 4) if (data[place]) return true;
  return false;
};
const inside = (one) => [one, ...(one.shadowRoot ? within(one.shadowRoot) : [])];
const within = (root) => [...root.querySelectorAll("*")].flatMap(inside);
const drawn = (plot) => within(plot).some((one) => one.tagName === "CANVAS" && one.width > 0 && painted(one));
const plots = document.querySelectorAll("main > section:not([hidden]) .plot");
return Object.fromEntries([...plots].map((plot) => [plot.id, drawn(plot)]));
"""
"""Which charts of the view that is shown have a painted canvas."""


def test_every_chart_of_every_view_is_drawn_without_a_complaint_or_a_request(browser: "Chrome", page: Path) -> None:
    requests(browser), complaints(browser)
    drawn: dict[str, bool] = {}
    for view in ("curves", "time", "evaluations", "rollouts", "settings"):
        open_page(browser, page, f"#{view}")
        drawn |= ask(browser, INKED)
    from ludic.report.charts import CURVES  # needs Bokeh, which an environment that only collects the tests may lack

    expected = {f"chart-{metric}" for metric, *_ in CURVES} | {"chart-pass-at-k"}
    expected |= {f"chart-{kind}-{run}" for kind in ("seconds", "timeline") for run in (0, 1)}
    assert drawn == dict.fromkeys(expected, True)
    assert complaints(browser) == []
    urls = [url for url in requests(browser) if not url.startswith("data:")]  # of Bokeh's icons
    assert len(urls) == 5 and all(url.startswith(f"{page.absolute().as_uri()}?") for url in urls)


def test_text_of_a_run_stays_text_everywhere(browser: "Chrome", page: Path) -> None:
    for view in ("#rollouts?group=0", "#rollouts?q=owned&group=0", "#curves?step=3", "#settings", "#evaluations"):
        open_page(browser, page, view)
        assert ask(browser, "return document.title").endswith("ludic report")
        assert ask(browser, "return document.querySelectorAll('main script, main img, main b').length") == 0
    open_page(browser, page, "#rollouts?group=0")
    assert ask(browser, "return document.querySelector('.card pre').textContent") == HOSTILE
    assert ask(browser, "return document.querySelector('.prompt').textContent") == HOSTILE
    open_page(browser, page, "#settings")
    assert HOSTILE in ask(browser, "return document.getElementById('view-settings').textContent")
    assert complaints(browser) == []


@pytest.mark.parametrize(
    ("filters", "passes"),
    [
        ("verdict=right", lambda row: row["correct"]),
        ("finish=length", lambda row: row["finish_reason"] == "length"),
        ("answer=missing", lambda row: row["parse_error"] is not None),
        ("min=0.5", lambda row: row["reward"] >= 0.5),
        ("max=0.5", lambda row: row["reward"] <= 0.5),
        ("steps=2-3", lambda row: row["step"] in (2, 3)),
        ("steps=4", lambda row: row["step"] == 4),
        ("q=problem%2017%3A", lambda row: row["prompt"].lower().startswith("problem 17:")),
        ("q=MARBLES+tickets", lambda row: "marbles tickets" in (row["completion"] + row["prompt"]).lower()),
        ("verdict=wrong&finish=stop", lambda row: not row["correct"] and row["finish_reason"] == "stop"),
    ],
)
def test_a_filter_leaves_the_groups_with_a_completion_that_passes(
    browser: "Chrome", page: Path, filters: str, passes: Any
) -> None:
    records: list[Any] = read_jsonl(page.parent / "first" / "sums_train_rollouts.jsonl")
    open_page(browser, page, f"#rollouts?{filters}")
    assert ask(browser, "return browser.found") == sorted({row["group"] for row in records if passes(row)})


def test_a_link_shows_its_group_and_its_completion_again(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#rollouts?steps=2&verdict=mixed")
    press(browser, "j")
    press(browser, "j")
    wait_for(browser, "document.querySelector('.detail h2').textContent.includes(`group ${browser.found[2]}`)")
    heading = ask(browser, "return document.querySelector('.detail h2').textContent")
    target = ask(browser, "return document.querySelectorAll('.card header a')[3].getAttribute('href')")
    open_page(browser, page, target)
    assert ask(browser, "return document.querySelector('.detail h2').textContent") == heading
    named = "return [...document.querySelectorAll('.card')].findIndex((card) => card.classList.contains('named'))"
    assert ask(browser, named) == 3


def test_a_completion_has_its_advantage_its_answer_and_its_box(browser: "Chrome", page: Path) -> None:
    records: list[Any] = read_jsonl(page.parent / "first" / "sums_train_rollouts.jsonl")
    groups = [records[start : start + 8] for start in range(8, len(records), 8)]
    rows = next(rows for rows in groups if 0 < sum(row["reward"] for row in rows) < 8)
    open_page(browser, page, f"#rollouts?group={rows[0]['group']}")
    shown = ask(browser, "return [...document.querySelectorAll('.card')].map((card) => card.textContent)")
    advantages = group_advantages([row["reward"] for row in rows], normalise_std=True)
    for text, row, advantage in zip(shown, rows, advantages, strict=True):
        sign = "+" if advantage > 0 else "\u2212"
        assert f"adv {sign}{abs(advantage):.2f}" in text
        assert row["completion"] in text
    boxes = ask(browser, "return [...document.querySelectorAll('.card mark.box')].map((box) => box.textContent)")
    assert boxes == [f"\\boxed{{{row['answer']}}}" for row in rows if row["answer"] is not None]


def test_the_list_has_elements_for_what_is_seen_only(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#rollouts")
    assert ask(browser, "return browser.found.length") == 128
    assert 10 < ask(browser, "return document.querySelectorAll('.row').length") < 60
    ask(browser, "browser.elements.list.scrollTop = 1e6")
    wait_for(browser, "document.querySelector('.row[aria-posinset=\"128\"]') !== null")


def place_on_curve(browser: "Chrome", step: float) -> tuple[int, int]:
    """Where an update is in the first chart, in pixels of the window."""
    program = """
    const view = Bokeh.index.get_by_id(modelsOf(charts.documents[0], "Figure")[0].id);
    const box = view.el.getBoundingClientRect();
    return [box.x + view.frame.x_scale.compute(arguments[0]), box.y + view.frame.bbox.vcenter];
    """
    x, y = ask(browser, program, step)
    return round(x), round(y)


def point(browser: "Chrome", *steps: float, drag: bool = False, clicks: int = 0) -> None:
    """Move the pointer over the first chart from update to update; with `drag`, while its button is down."""
    from selenium.webdriver.common.action_chains import ActionChains  # as above

    actions = ActionChains(browser)
    pointer = actions.w3c_actions.pointer_action
    for number, step in enumerate(steps):
        pointer.move_to_location(*place_on_curve(browser, step))  # type: ignore[no-untyped-call]
        if drag and number == 0:
            pointer.pointer_down()  # type: ignore[no-untyped-call]
    if drag:
        pointer.pointer_up()  # type: ignore[no-untyped-call]
    for _ in range(clicks):
        pointer.click()
    actions.perform()


def test_the_figures_of_the_update_under_the_pointer_are_in_every_caption(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#curves")
    assert ask(browser, "return document.querySelectorAll('.reading').length") == 0
    point(browser, 2, 3)
    wait_for(browser, "document.querySelectorAll('.reading').length === 11")  # all but the accuracy, of updates 0 and 4
    said = ask(browser, "return document.getElementById('chart-grad_norm-readout').textContent")
    assert said == "update 3 0.30.3"


def test_a_drag_zooms_all_curves_and_a_double_click_shows_the_whole_run_again(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#curves")
    seen = "(() => { const { start, end } = modelsOf(charts.documents[0], 'Figure').at(-1).x_range; return [start, end]; })()"
    whole = ask(browser, f"return {seen}")
    point(browser, 1.0, 1.5, 2.0, drag=True)
    wait_for(browser, f"Math.abs({seen}[0] - 1) < 0.1 && Math.abs({seen}[1] - 2) < 0.1")
    for _ in range(20):  # on a busy machine the two clicks may come too far apart to be a double one
        point(browser, 1.5, clicks=2)
        time.sleep(0.25)
        if ask(browser, f"return {seen}") == whole:
            break
    assert ask(browser, f"return {seen}") == whole


def test_a_click_on_a_curve_chooses_its_update(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#curves")
    point(browser, 2, clicks=1)
    wait_for(browser, "location.hash === '#curves?step=2'")
    wait_for(browser, "document.querySelector('#step-panel h3')?.textContent === 'Update 2'")
    panel = ask(browser, "return document.getElementById('step-panel').textContent")
    assert "grad_norm" in panel and "rollouts of first" in panel


def test_the_parts_of_the_update_under_the_pointer_are_said_on_the_timeline(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#time")
    ask(browser, "pointAtTime(5, modelsOf(charts.documents[0], 'Figure')[1], 'chart-timeline-0')")
    said = ask(browser, "return document.getElementById('chart-timeline-0-readout').textContent")
    assert said.startswith("update 1: step 4.00 s, wait 1.20 s, train 2.00 s, sync 0.50 s"), said


def test_alarms_and_events_are_listed_and_lead_to_their_update(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#curves")
    listed = ask(browser, "return [...document.querySelectorAll('.events li')].map((item) => item.textContent)")
    assert len(listed) == 3 and sum("truncated" in text for text in listed) == 2
    links = ask(browser, "return [...document.querySelectorAll('.events a')].map((a) => a.getAttribute('href'))")
    assert sorted(links) == ["#curves?step=2", "#curves?step=2", "#curves?step=3"]


def test_a_run_can_be_hidden_in_the_curves(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#curves")
    ask(browser, "document.querySelectorAll('.runs input')[1].click()")
    visible = """return modelsOf(charts.documents[0], 'GlyphRenderer').filter((one) => one.visible).flatMap((one) => one.tags)"""
    wait_for(browser, f"!(() => {{ {visible} }})().includes('run-1')")
    assert "run-0" in ask(browser, visible)


def test_the_settings_that_differ_are_named(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#settings")
    rows = "[...document.querySelector('#view-settings table').rows]"
    cells = f"return {rows}.map((row) => [...row.cells].map((cell) => cell.textContent))"
    assert ask(browser, cells) == [["setting", "first", "second"], ["seed", "0", "1"]]


def test_the_worst_problem_leads_to_its_completions(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#evaluations")
    program = (
        "return [...document.querySelectorAll('#view-evaluations a[href*=group]')].map((a) => a.getAttribute('href'))"
    )
    (link,) = ask(browser, program)
    open_page(browser, page, link)
    assert ask(browser, "return document.querySelector('.detail h2').textContent") == "Problem 0"
    assert ask(browser, "return document.querySelectorAll('.card').length") == 4


def test_the_page_is_used_with_keys_alone(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#curves")
    press(browser, "3")
    wait_for(browser, "!document.getElementById('view-rollouts').hidden && document.querySelector('.detail h2')")
    press(browser, "/")
    assert ask(browser, "return document.activeElement.name") == "q"
    ask(browser, "document.activeElement.blur()")
    press(browser, "t")
    assert ask(browser, "return document.documentElement.dataset.theme") == "dark"
    press(browser, "?")
    assert ask(browser, "return document.getElementById('keys').open") is True


def test_no_view_is_wider_than_a_phone(browser: "Chrome", page: Path) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for view in ("curves?step=2", "time", "rollouts", "evaluations", "settings"):
            open_page(browser, page, f"#{view}")
            assert ask(browser, "return document.documentElement.scrollWidth") <= 390, view
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


TOKENS = """
return [...document.querySelector('.card pre').querySelectorAll('.token')].map((token) =>
  [token.textContent, token.style.getPropertyValue('--strength'), token.classList.contains('more')]);
"""


def test_tokens_are_shaded_by_log_prob_by_gap_or_not_and_the_link_says_by_which(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#rollouts?group=127")
    texts = ["<b>", "", "≠", "🙂", " \\boxed{7}", ""]
    by_logprob = [8, 60, 30, 0, 2, 3]
    assert ask(browser, TOKENS) == [[text, f"{part}%", False] for text, part in zip(texts, by_logprob, strict=True)]
    assert ask(browser, "return document.querySelector('.card pre').textContent") == "<b>≠🙂 \\boxed{7}"
    assert ask(browser, "return document.querySelector('.card mark.box').textContent") == "\\boxed{7}"
    assert "0 nats, certain" in ask(browser, "return document.querySelector('.shading').textContent")
    press(browser, "s")
    wait_for(browser, "document.querySelector('.ramp.gap')")
    assert ask(browser, "return location.hash") == "#rollouts?group=127&shade=gap"
    by_gap = [(60, True), (30, False), (0, False), (0, False), (15, True), (60, False)]
    assert ask(browser, TOKENS) == [[text, f"{part}%", more] for text, (part, more) in zip(texts, by_gap, strict=True)]
    assert "\u22120.02 nats, trainer finds it less likely" in ask(
        browser, "return document.querySelector('.shading').textContent"
    )
    assert ask(browser, "return document.querySelector('.card header a').getAttribute('href')").endswith(
        "shade=gap&group=127&member=0"
    )
    press(browser, "s")
    wait_for(browser, "location.hash.endsWith('shade=none')")
    wait_for(browser, "document.querySelectorAll('.card .token').length === 0")
    open_page(browser, page, "#rollouts?group=127&shade=gap")
    assert ask(browser, "return document.querySelector('.choices a[aria-current]').textContent") == "gap to the trainer"
    assert complaints(browser) == []


def test_a_token_says_its_numbers_under_the_pointer_and_to_the_arrow_keys(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#rollouts?group=127&shade=gap")
    said = 'token 1 "<b>": log-prob -0.500 nats, p 0.607, trainer +0.02'
    assert ask(browser, "return document.querySelector('.token').title") == said
    ask(browser, "document.querySelector('.token').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))")
    readout = "return document.querySelector('.card .token-readout').textContent"
    assert ask(browser, readout) == said
    key = "document.querySelector('.card pre').dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0]}))"
    ask(browser, key, "ArrowRight")
    assert ask(browser, readout).startswith(
        "token 2 without text of its own: log-prob -9.000 nats, p 0.000, trainer \u22120.01"
    )
    ask(browser, key, "ArrowLeft")
    assert ask(browser, readout) == said


def test_groups_without_log_probs_lead_to_those_that_have_them(browser: "Chrome", page: Path) -> None:
    open_page(browser, page, "#rollouts?group=3")
    assert ask(browser, "return document.querySelectorAll('.token').length") == 0
    href = ask(browser, "return document.querySelector('.shading a').getAttribute('href')")
    open_page(browser, page, href)
    assert ask(browser, "return browser.found") == [126, 127]
    open_page(browser, page, "#rollouts?group=126&shade=gap")
    assert "has not been trained on" in ask(browser, "return document.querySelector('.shading').textContent")
    open_page(browser, page, "#rollouts?source=2")
    assert ask(browser, "return document.querySelector('.shading')") is None
