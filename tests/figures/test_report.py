"""The report page of a made-up study in a browser: complete, sortable, offline."""

import base64
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from records import LOGITS, Y, record, write_run
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from utils import caveats, results

ROOT = Path(__file__).resolve().parents[2]
PIXEL = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)
# A cell may hold this; no part of it may become markup.
NASTY = '<img src="https://example.org/x.png" onerror="alert(1)"> & EPYC'
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1400,1000",
)  # fmt: skip
# Model, method, dtype, backend, latency at batch 1, difference to FP32, verdict, speed-ups, MiB.
RUNS = (
    ("resnet18", "fp32", "fp32", "native", 100.5, None, None, 1.0, 0.75, 42.5),
    ("resnet18", "ptq", "int8", "fbgemm", 9.5, -0.002, "held", 10.5, 7.125, 10.75),
    ("resnet18", "qat", "int8", "fbgemm", 20.25, -0.02, "lost", 4.5, 3.5, 10.5),
    ("resnet18", "ptq", "int16", "simulated", None, 0.001, "held", None, None, 21.5),
    ("alexnet", "fp32", "fp32", "native", 200.5, None, None, 1.0, 0.5, 217.5),
    ("alexnet", "ptq", "int8", "fbgemm", 30.75, -0.004, "undecided", 6.5, 3.25, 54.5),
)


def write_row(
    folder, model, method, dtype, backend, latency, difference, verdict, eager, best, size
):
    given = record(model=model, backend=backend, batches=(1, 8))
    simulated = backend == "simulated"
    given["run"] |= dict(method=method, dtype=dtype, simulated=simulated)
    given["metrics"] |= dict(
        accuracy_difference=difference,
        accuracy_difference_ci_low=difference - 0.01 if verdict else None,
        accuracy_difference_ci_high=difference + 0.01 if verdict else None,
        mcnemar_p=0.25 if verdict else None,
        margin=0.005 if verdict else None,
        verdict=verdict,
    )
    given["metrics"] |= dict(accuracy=0.9625, n_test=2000, tn=960, fp=40, fn=35, tp=965)
    given["footprint"]["size_mb"] = size
    given["environment"] |= dict(
        cpu=NASTY,
        native_fp16=None,
        torch="2.13.0",
        git_commit="c" * 40,
        time_utc="2026-01-02T03:04:05",
    )
    if simulated:
        given["timing"] = [dict(threads=2, batch_size=None)]
    else:
        for n, timing in enumerate(given["timing"]):
            timing |= timed(latency * (1 + 7 * n), eager, best)
    results.write(given, LOGITS, Y, folder)


def timed(latency, eager, best):
    """Times of a row, with the speed-ups over eager and over the fastest FP32."""
    timing = dict(latency_ms_p50=latency, threads=2, contended=False, protocol="rounds")
    timing |= dict(best_fp32="onnxruntime", n_launches=6)
    for name, value in (("speedup_vs_eager_fp32", eager), ("speedup_vs_best_fp32", best)):
        timing |= {name: value, f"{name}_ci_low": value - 0.25, f"{name}_ci_high": value + 0.25}
    return timing


def render(folder, *options, out="out"):
    where = ["--results", folder / "results", "--out", folder / out]
    command = [sys.executable, ROOT / "figures/report.py", *where, *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with results/drawn/ and the page that a user made from it in another folder."""
    folder = tmp_path_factory.mktemp("study")
    for run in RUNS:
        write_row(folder / "results", *run)
    (folder / "out").mkdir()
    (folder / "out/accuracy_by_dtype.png").write_bytes(PIXEL)
    done = render(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written: {folder / 'out/report.html'}\n"
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(names):
        message = "the report page is tested in Chromium: apt-get install chromium chromium-driver"
        pytest.fail(message, pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = names[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=names[1]))
    yield driver
    driver.quit()


@pytest.fixture
def page(study, browser):
    browser.get((study / "out/report.html").as_uri())
    return browser


def table(study):
    with (study / "results/drawn/results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def headings(page):
    return page.find_elements(By.CSS_SELECTOR, "#results-table thead th")


def heading(page, name):
    return next(head for head in headings(page) if head.text.split()[0] == name)


def column(page, name):
    """Cells of a column in the visible rows, from the top."""
    script = """
        const heads = [...document.querySelectorAll("#results-table thead th")];
        const place = heads.findIndex(head => head.textContent === arguments[0]);
        const rows = [...document.querySelectorAll("#results-table tbody tr:not([hidden])")];
        return rows.map(row => row.cells[place].textContent);
    """
    return page.execute_script(script, name)


def text(page, selector):
    return page.find_element(By.CSS_SELECTOR, selector).text


# ---- texts and numbers


def test_every_cell_of_the_table_is_in_the_page_unchanged(study, page):
    rows = table(study)
    assert list(rows[0]) == list(results.COLUMNS)
    for name in results.COLUMNS:
        assert column(page, name) == [row[name] for row in rows], name


def test_the_findings_follow_from_the_numbers(page):
    lead = text(page, ".lead")
    assert (
        "Of 3 INT8 variants, 1 held the accuracy of FP32 within 0.5 points, 1 lost more and 1 "
        "remain undecided"
    ) in lead
    assert "Largest speed-up: 10.50 times over eager FP32, 7.12 times over the best FP32." in lead
    findings = text(page, "main > dl")
    for part in (
        "held: ResNet-18 (PTQ fbgemm)",
        "undecided: AlexNet (PTQ fbgemm)",
        "lost: ResNet-18 (QAT fbgemm)",
        "95 % interval 10.25 to 10.75",
        "above 1 (faster) for 3 of 3 variants, below 1 (slower) for 0",
        "The best FP32 was onnxruntime",
        "10.50 MiB: ResNet-18 INT8 QAT fbgemm; 0.25 of its FP32 file",
    ):
        assert part in findings


def test_simulated_rows_are_marked_and_the_page_says_why_they_have_no_speed(page):
    marked = page.find_elements(By.CSS_SELECTOR, "#results-table tr.simulated")
    assert [row.text.split()[:4] for row in marked] == [["resnet18", "ptq", "int16", "simulated"]]
    assert f"{caveats.MEANING['simulated']} This concerns 1 of 11 rows." in text(page, "main")


def test_the_figure_has_its_scripts_caption_and_an_alternative(page):
    (image,) = page.find_elements(By.CSS_SELECTOR, "figure img")
    assert page.execute_script("return arguments[0].naturalWidth", image) == 1
    assert "ResNet-18" in image.get_attribute("alt")
    assert text(page, "figcaption").startswith("Figure 1. Test accuracy")


def test_markup_in_a_cell_is_text(study, page):
    assert NASTY in text(page, "#hardware + .scroll")
    assert not page.find_elements(By.CSS_SELECTOR, "img[src^=http], [onerror]")


# ---- interaction


def test_a_heading_sorts_by_numbers_up_then_down_with_empty_cells_last(study, page):
    given = [row["latency_ms_p50"] for row in table(study)]
    numbers = sorted((cell for cell in given if cell), key=float)
    assert numbers != sorted(numbers), "they would sort differently as text"
    head = heading(page, "latency_ms_p50")
    assert head.get_attribute("aria-sort") is None and "" in given
    for order, expected in (("ascending", numbers), ("descending", numbers[::-1])):
        head.find_element(By.TAG_NAME, "button").click()
        assert column(page, "latency_ms_p50") == [*expected, *[""] * given.count("")]
        assert head.get_attribute("aria-sort") == order
        assert text(page, "#state") == f"11 rows, sorted by latency_ms_p50, {order}"
    # Rows stay whole.
    assert (column(page, "model")[0], column(page, "size_mb")[0]) == ("alexnet", "217.5")


def test_the_keyboard_also_sorts(page):
    heading(page, "size_mb").find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert column(page, "size_mb") == sorted(column(page, "size_mb"), key=float)
    heading(page, "verdict").find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    verdicts = column(page, "verdict")
    assert verdicts == sorted(verdicts, key=lambda cell: (cell == "", cell))
    (head,) = page.find_elements(By.CSS_SELECTOR, "th[aria-sort]")
    assert head.get_attribute("aria-sort") == "ascending"


def test_rows_are_filtered_by_model_by_words_and_by_both(page):
    model = page.find_element(By.XPATH, "//label[starts-with(normalize-space(), 'model')]/select")
    model.send_keys("alexnet")
    assert column(page, "model") == ["alexnet"] * 4
    assert text(page, "#state") == "4 of 11 rows"
    words = page.find_element(By.CSS_SELECTOR, "input[type=search]")
    words.send_keys("INT8 undecided")
    assert column(page, "dtype") == ["int8"] * 2
    words.send_keys(" nonsense")
    assert column(page, "dtype") == []
    page.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
    # The page filters once the fields are empty.
    WebDriverWait(page, 30).until(lambda _: len(column(page, "model")) == 11)
    assert text(page, "#state") == "11 rows"


def test_a_switch_shows_the_other_columns(page):
    def seen():
        return [head.text for head in headings(page) if head.is_displayed()]

    assert {"model", "accuracy", "verdict", "size_mb"} <= set(seen()) and len(seen()) < 20
    page.find_element(By.ID, "all-columns").click()
    assert sorted(seen()) == sorted(results.COLUMNS)


def test_the_search_covers_the_visible_columns(study, page):
    box = page.find_element(By.CSS_SELECTOR, "#filter input")
    hidden = next(row["data_sha256"] for row in table(study))
    box.send_keys(hidden[:12])
    assert column(page, "model") == []
    page.find_element(By.ID, "all-columns").click()
    assert len(column(page, "model")) == 11


def test_a_made_table_is_sorted_within_its_models(page):
    script = """
        const named = table => table.caption.textContent.startsWith("All variants");
        const table = [...document.querySelectorAll("table.made")].find(named);
        const titles = [...table.tHead.rows[0].cells];
        const place = titles.findIndex(title => title.textContent === arguments[0]);
        titles[place].firstElementChild.click();
        const shown = row => row.cells.length > 1
            ? row.cells[place].firstChild?.textContent ?? "" : row.textContent.trim();
        const groups = [...table.tBodies].map(group => [...group.rows].map(shown));
        return [titles[place].ariaSort, ...groups];
    """
    assert page.execute_script(script, "MiB") == [
        "ascending",
        ["AlexNet", "54.50", "217.50"],
        ["ResNet-18", "10.50", "10.75", "21.50", "42.50"],
    ]
    assert page.execute_script(script, "MiB")[0] == "descending"
    times = page.execute_script(script, "ms at batch 1")
    assert times[2] == ["ResNet-18", "9.50", "20.25", "100.50", ""]  # empty cells are last


def test_a_heading_says_what_its_column_is(page):
    assert heading(page, "size_mb").get_attribute("title") == "size of the file to deploy (MiB)"
    titles = [head.get_attribute("title") for head in headings(page)]
    assert all(titles) and not any("`" in title for title in titles)


# ---- the scatter plot and the comparison


def test_a_point_lies_at_its_ratio_and_says_its_numbers(page):
    points = page.find_elements(By.CSS_SELECTOR, "#scatter .point")
    assert len(points) == 5  # the simulated run has no time

    def labelled(start):
        return next(p for p in points if p.get_attribute("aria-label").startswith(start))

    fast = labelled("ResNet-18 INT8 PTQ fbgemm: 96.25 % [")
    slow = labelled("ResNet-18 FP32 native")
    says = "7.12 times as fast as the fastest FP32 (onnxruntime), 10.75 MiB, held"
    assert says in fast.get_attribute("aria-label")
    line = page.find_element(By.CSS_SELECTOR, "#scatter .unity").rect["x"]
    assert fast.rect["x"] + fast.rect["width"] < line < slow.rect["x"]
    page.execute_script("arguments[0].focus()", fast)
    assert text(page, "#point") == fast.get_attribute("aria-label")
    page.execute_script("arguments[0].dispatchEvent(new PointerEvent('pointerenter'))", slow)
    assert text(page, "#point") == slow.get_attribute("aria-label")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A page of two runs that decide two of four images differently; one name is markup."""
    folder = tmp_path_factory.mktemp("compared")
    y = np.array([0, 0, 1, 1])
    for backend, decisions in (("fbgemm", [0, 1, 1, 0]), ("x86", [0, 0, 1, 1])):
        logits = np.eye(2, dtype=np.float32)[decisions]
        names = ["a.jpg", NASTY, "c.jpg", "d\u202e.jpg"]
        results.write(record(backend=backend, batches=(1,)), logits, y, folder / "results", names)
    assert render(folder).returncode == 0
    return folder


def test_two_variants_are_compared_image_by_image_by_name(compared, browser):
    browser.get((compared / "out/report.html").as_uri())
    assert text(browser, "#compared") == (
        "Of 4 images, both decide 2 right and 0 wrong; only the first is right on 0, only the "
        "second on 2."
    )
    script = """
        const rows = [...document.querySelectorAll('#flips tbody tr')];
        return rows.map(row => [...row.cells].map(cell => cell.textContent));
    """
    assert browser.execute_script(script) == [
        [NASTY, "cat", "dog", "cat"],
        ["d\u202e.jpg", "dog", "cat", "dog"],
    ]
    browser.find_element(By.ID, "second").send_keys(Keys.ARROW_UP)
    says = "both decide 2 right and 2 wrong; only the first is right on 0"
    assert says in text(browser, "#compared")
    assert not browser.find_element(By.ID, "flips").is_displayed()
    assert browser.get_log("browser") == []


def test_images_without_names_are_numbered(study, page):
    caption = page.find_element(By.CSS_SELECTOR, "#flips caption")
    assert "numbered in the order" in caption.get_attribute("textContent")


def test_each_run_and_the_table_are_linked(study, page):
    links = page.find_elements(By.CSS_SELECTOR, "td a, th a, caption a")
    files = {Path(unquote(urlsplit(link.get_attribute("href")).path)) for link in links}
    runs = (study / "results/drawn/runs").glob("*.json")
    assert files == {study / "results/drawn/results.csv", *runs}


def test_the_committed_study_prints_on_twelve_pages(browser):
    browser.get((ROOT / "figures/cats_and_dogs/report.html").as_uri())
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    pages = re.findall(rb"/Type\s*/Page[^s]", base64.b64decode(printed["data"]))
    assert 4 < len(pages) <= 12


def test_printed_heads_are_not_buttons_which_only_the_first_sheet_would_have(browser):
    browser.get((ROOT / "figures/cats_and_dogs/report.html").as_uri())
    shapes = """
        const buttons = [...document.querySelectorAll('.made thead button')];
        return buttons.map(button => getComputedStyle(button).display);
    """
    shown = {}
    for medium in ("screen", "print"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(media=medium))
        shown[medium] = set(browser.execute_script(shapes))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(media=""))
    assert shown == {"screen": {"block"}, "print": {"contents"}}


@pytest.mark.parametrize("width", [390, 768, 1280, 1920])
def test_nothing_sticks_out_at_any_width(browser, width):
    screen = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get((ROOT / "figures/cats_and_dogs/report.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# ---- the page as a file


def requested(browser):
    """URLs that the browser has requested since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    return [event["params"]["request"]["url"] for event in sent]


def links_of(source):
    """Links and addresses in a page that a browser could follow or load."""
    links = []
    for tag in re.findall(r"<[a-z][^>]*>", source):
        links += re.findall(r'\b(?:src|href|srcset|action|data)="([^"]*)"', tag)
    return links


def test_the_page_links_only_to_its_files(study):
    source = (study / "out/report.html").read_text(encoding="utf-8")
    links = links_of(source)
    nearby = [link for link in links if not link.startswith(("#", "data:", "../results/drawn/"))]
    assert nearby == ["accuracy_by_dtype.png"] and len(links) > 10
    assert "@import" not in source and "url(" not in source


def test_a_standalone_page_contains_its_figures(study):
    assert render(study, "--standalone", out="alone").returncode == 0
    assert "<img" not in (study / "alone/report.html").read_text(encoding="utf-8")
    shutil.copy(study / "out/accuracy_by_dtype.png", study / "alone")
    assert render(study, "--standalone", out="alone").returncode == 0
    source = (study / "alone/report.html").read_text(encoding="utf-8")
    assert all(link.startswith(("#", "data:", "../results/drawn/")) for link in links_of(source))
    embedded = re.findall(r'<img src="data:image/png;base64,([^"]*)"', source)
    assert [base64.b64decode(picture) for picture in embedded] == [PIXEL]


def test_a_standalone_page_shows_its_figures_in_another_folder(study, browser, tmp_path):
    (study / "alone").mkdir(exist_ok=True)
    shutil.copy(study / "out/accuracy_by_dtype.png", study / "alone")
    assert render(study, "--standalone", out="alone").returncode == 0
    shutil.copy(study / "alone/report.html", tmp_path)
    browser.get((tmp_path / "report.html").as_uri())
    (image,) = browser.find_elements(By.CSS_SELECTOR, "figure img")
    assert browser.execute_script("return arguments[0].naturalWidth", image) == 1
    assert browser.get_log("browser") == []


def test_nothing_is_loaded_from_a_network_and_nothing_goes_wrong(study, page):
    requested(page)  # the browser's first page
    page.refresh()
    for head in page.find_elements(By.CSS_SELECTOR, "#results-table thead button")[:3]:
        head.click()
    urls = requested(page)
    assert urls and all(url.startswith(("file:", "data:")) for url in urls)
    assert page.get_log("browser") == []


def test_the_page_fits_a_phone_and_is_in_order(page):
    phone = dict(width=390, height=844, deviceScaleFactor=1, mobile=True)
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert page.execute_script("return document.documentElement.scrollWidth") == 390
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    levels = [head.tag_name for head in page.find_elements(By.CSS_SELECTOR, "h1, h2, h3, h4")]
    assert levels == ["h1"] + ["h2"] * (len(levels) - 1)
    assert page.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"
    for table in page.find_elements(By.TAG_NAME, "table"):
        assert len(table.find_elements(By.TAG_NAME, "caption")) == 1


def test_the_same_results_give_the_same_bytes(study):
    before = (study / "out/report.html").read_bytes()
    assert render(study).returncode == 0
    assert (study / "out/report.html").read_bytes() == before


def test_a_study_that_is_not_there_is_named_in_one_line(study):
    done = render(study, "--study", "nowhere")
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: figures/report.py: there is no .*nowhere.*\n", done.stderr)


# ---- caveats, classes and processors


def page_of(folder, study, *runs):
    """Make the page of a study of small runs and return its source."""
    for run, changes in runs:
        write_run(folder / "results", *run, study=study, **changes)
    done = render(folder, "--study", study)
    assert done.returncode == 0, done.stderr
    return (folder / "out/report.html").read_text(encoding="utf-8")


BASELINE, PTQ = ("resnet18", "fp32", "fp32", "native"), ("resnet18", "ptq", "int8", "fbgemm")


def test_the_page_names_the_classes_of_its_study(tmp_path):
    for name in ("confusion_matrices", "reliability"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / f"out/{name}.png").write_bytes(PIXEL)
    classes = dict(classes=("apples", "pears"))
    page = page_of(tmp_path, "fruit", (BASELINE, classes), (PTQ, classes))
    assert "for the class pears" in page and page.count("<figcaption>") == 2
    assert not re.search(r"\b(cat|dog|animal)s?\b", page, re.I)


def test_a_smoke_study_with_a_few_images_has_its_caveats(tmp_path):
    page = page_of(tmp_path, "pets_smoke", (BASELINE, {}), (PTQ, {}))
    assert f'<p class="warning">{caveats.MEANING["smoke"]}</p>' in page
    fewest = caveats.fewest_images(0.005)
    assert f"needs at least {fewest} test images. This concerns 4 of 8 rows." in page


def test_a_page_names_all_processors(tmp_path):
    runs = ((BASELINE, dict(cpu="AMD EPYC")), (PTQ, dict(cpu="Intel Xeon")))
    page = page_of(tmp_path, "pets", *runs)
    assert "AMD EPYC (1 run), Intel Xeon (1 run)" in page
    assert "speed-ups are ratios on the same machine. This concerns 4 of 8 rows." in page
