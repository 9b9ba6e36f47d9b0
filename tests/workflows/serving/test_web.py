"""The web page in Chromium, against the real application without Ray."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image
from serving import endpoint, save_detector, save_segmenter

from ovd_models.checkpoint_info import write_calibration
from workflows.serving.api import WEB, build_api

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
expect = playwright.expect
OWN_THRESHOLD = 0.12
WIDTHS = {"phone": (390, 844), "tablet": (768, 1024), "desk": (1440, 900)}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("web")
    models = f"boxes={save_detector(root / 'boxes')},pointer={save_segmenter(root / 'pointer')}"
    write_calibration(root / "boxes", OWN_THRESHOLD, "pictograms-eval")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(build_api(endpoint(models, root)), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    base = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            httpx.get(f"{base}/healthz")
            break
        except httpx.ConnectError:
            time.sleep(0.05)
    yield base
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "playwright.Browser", url: str) -> Iterator["playwright.Page"]:
    """The page after its first answer; it asks no other host, and nothing goes wrong on it."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda asked: faults.append(asked.url) if not asked.url.startswith((url, "blob:")) else None)
    page.goto(url)
    expect(page.locator("#status")).to_contain_text("result")
    yield page
    context.close()
    assert faults == []


def choose(page: "playwright.Page", mode: str) -> None:
    page.locator("#modes").get_by_text(mode, exact=True).click()


def test_names_are_found_and_singled_out(page: "playwright.Page") -> None:
    names = page.get_by_label("Names: add a name")
    names.fill("anchor")
    names.press("Enter")
    names.type("snowman,")
    expect(page.locator(".chip")).to_have_count(2)
    page.locator("#threshold").fill("0.05")
    expect(page.locator(".found:visible button").first).to_be_visible()
    expect(page.locator(".found:visible .name", has_text="umbrella")).to_have_count(0)  # of the answer before
    labels = page.locator(".found:visible .name").all_inner_texts()
    assert set(labels) <= {"anchor", "snowman"}
    page.locator(".found:visible button").first.hover()
    expect(page.locator(".found:visible button").first).to_have_class("on")
    page.locator("#threshold").fill("0.95")
    expect(page.locator(".empty:visible")).to_contain_text("below the threshold")
    page.get_by_label("Remove anchor").click()
    expect(page.locator(".chip")).to_have_count(1)


def test_scores_are_shown_above_the_models_own_threshold_until_another_is_chosen(page: "playwright.Page") -> None:
    slider, shown = page.locator("#threshold"), page.locator("#threshold-value")
    expect(slider).to_have_value(str(OWN_THRESHOLD))
    expect(shown).to_have_text(f"{OWN_THRESHOLD:.2f}")
    choose(page, "Everything")
    expect(slider).to_have_value("0.3")
    choose(page, "Find")
    expect(slider).to_have_value(str(OWN_THRESHOLD))
    slider.fill("0.5")
    choose(page, "Everything")
    expect(slider).to_have_value("0.5")
    expect(shown).to_have_text("0.50")


def test_an_object_has_one_name_unless_all_are_wanted(page: "playwright.Page", url: str) -> None:
    page.locator("#threshold").fill("0.05")
    few = page.locator(".found:visible button").count()
    page.get_by_label("One name for each thing").uncheck()
    expect(page.locator(".found:visible button")).not_to_have_count(few)
    assert page.locator(".found:visible button").count() > few
    with page.expect_response("**/v1/detect") as answered:
        page.get_by_label("One name for each thing").check()
    assert len(answered.value.json()["detections"]) == few  # chosen by the server, before its limit
    expect(page.locator(".found:visible button")).to_have_count(few)


def test_a_click_after_undo_begins_an_object(page: "playwright.Page") -> None:
    kinds = page.evaluate(
        """async () => {
          const { Prompts } = await import("/web/prompts.js");
          const click = { kind: "point", x: 1, y: 1, on: true }, box = { kind: "box", box: [0, 0, 2, 2] };
          const prompts = new Prompts();
          for (const prompt of [box, click]) prompts.add(prompt);
          prompts.undo();
          prompts.add(click);
          return prompts.objects.map((entry) => [Boolean(entry.box), entry.points.length]);
        }"""
    )
    assert kinds == [[True, 0], [False, 1]]


def test_clicks_and_boxes_give_a_mask_and_a_name(page: "playwright.Page") -> None:
    choose(page, "Click")
    canvas = page.locator("canvas:visible")
    frame = canvas.bounding_box()
    assert frame is not None
    page.mouse.click(frame["x"] + 100, frame["y"] + 100)
    expect(page.locator(".found:visible button")).to_have_count(1)
    page.keyboard.down("Shift")
    page.mouse.click(frame["x"] + 300, frame["y"] + 300)
    page.keyboard.up("Shift")
    expect(page.locator("#status")).to_contain_text("1 result")
    page.mouse.move(frame["x"] + 200, frame["y"] + 200)
    page.mouse.down()
    page.mouse.move(frame["x"] + 400, frame["y"] + 380, steps=4)
    page.mouse.up()
    expect(page.locator(".found:visible button")).to_have_count(2)
    page.keyboard.press("z")
    expect(page.locator(".found:visible button")).to_have_count(1)
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".found:visible button")).to_have_count(0)


def test_everything_and_errors_are_sentences(page: "playwright.Page", tmp_path: Path) -> None:
    choose(page, "Everything")
    expect(page.locator("#status")).to_contain_text("result", timeout=20_000)
    choose(page, "Find")
    page.get_by_label("Names: add a name").fill("zebra")  # not in the table of this model
    page.get_by_label("Names: add a name").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("zebra")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    page.locator("#file").set_input_files(broken)
    expect(page.get_by_role("alert")).to_contain_text("broken.png is not a picture")


def test_the_keyboard_alone_finds_and_points(page: "playwright.Page") -> None:
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.locator('#modes input[value="detect"]').focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#mode-hint")).to_contain_text("Shift-click")
    page.locator("canvas:visible").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator(".found:visible button")).to_have_count(1)
    page.keyboard.press("Tab")
    expect(page.locator(".found:visible button")).to_be_focused()


@pytest.mark.slow
def test_two_vocabularies_stand_side_by_side(page: "playwright.Page") -> None:
    page.get_by_label("Compare two").check()
    expect(page.locator(".pane:visible")).to_have_count(2)
    page.get_by_label("Names, second side: add a name").fill("anchor")
    page.get_by_label("Names, second side: add a name").press("Enter")
    expect(page.locator(".pane:visible h2").nth(1)).to_contain_text("anchor")


@pytest.mark.slow
def test_results_are_saved_and_the_request_is_copied(page: "playwright.Page", url: str) -> None:
    page.locator("#threshold").fill("0.05")
    with page.expect_download() as saved:
        page.get_by_role("button", name="COCO JSON").click()
    coco = json.loads(Path(saved.value.path()).read_text())
    assert saved.value.suggested_filename == "scene-1.coco.json"
    assert len(coco["annotations"]) == page.locator(".found:visible button").count() > 0
    with page.expect_download() as saved:
        page.get_by_role("button", name="PNG").click()
    assert Path(saved.value.path()).read_bytes().startswith(b"\x89PNG")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy curl").click()
    expect(page.locator("#status")).to_contain_text("copied")
    command = page.evaluate("navigator.clipboard.readText()")
    ran = subprocess.run(command, shell=True, cwd=WEB / "samples", capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["width"] == 128
    page.get_by_role("button", name="Copy Python").click()
    expect(page.locator("#status")).to_contain_text("program copied")
    compile(page.evaluate("navigator.clipboard.readText()"), "copied", "exec")


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_without_a_clipboard_copies_too(browser: "playwright.Browser", url: str, path: str) -> None:
    # as over plain HTTP from another machine
    context = browser.new_context()
    context.add_init_script(
        """Object.defineProperty(navigator, "clipboard", { value: undefined });
        sessionStorage.setItem("ovd-token", "secret");
        addEventListener("copy", () => (window.copied = document.activeElement.value));"""
    )
    page = context.new_page()
    page.goto(url + path)
    expect(page.locator("#status:has-text('result'), article").first).to_be_visible()
    button = page.locator("#copy-curl, article:has-text('/v1/detect') button").first
    button.click()
    expect(page.locator("#status:has-text('copied'), button:has-text('Copied')").first).to_be_visible()
    command = page.evaluate("window.copied")
    expect(button).to_be_focused()
    context.close()
    assert f"curl {url}/v1/detect" in command
    assert '-H "Authorization: Bearer $OVD_TOKEN"' in command


def test_results_of_an_earlier_picture_are_not_shown_on_one_that_is_refused(page: "playwright.Page") -> None:
    page.locator("#threshold").fill("0.05")
    expect(page.locator(".found:visible button").first).to_be_visible()
    page.route("**/v1/detect", lambda asked: asked.fulfill(status=400, json={"detail": "image: broken"}))
    page.get_by_label("Sample picture 2").click()
    expect(page.locator("#error")).to_contain_text("image: broken")
    page.locator("#threshold").fill("0.06")
    expect(page.locator(".found:visible button")).to_have_count(0)
    page.route("**/web/samples/*", lambda asked: asked.abort())
    page.get_by_label("Sample picture 3").click()
    expect(page.locator("#error")).to_contain_text("cannot be reached")


def test_a_word_of_an_input_method_is_no_name_yet(page: "playwright.Page") -> None:
    names = page.get_by_label("Names: add a name")
    names.fill("an")
    names.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(page.locator(".chip")).to_have_count(0)
    names.press("Enter")
    expect(page.locator(".chip")).to_have_count(1)


@pytest.mark.slow
def test_a_copied_request_has_places_of_the_users_file(page: "playwright.Page", tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.new("RGB", (3000, 1000), "grey").save(large)
    choose(page, "Click")
    page.locator("#file").set_input_files(large)  # reduced to 2048 x 683
    expect(page.locator("#status")).to_contain_text("Click on something")
    frame = page.locator("canvas:visible").bounding_box()
    assert frame is not None
    page.mouse.click(frame["x"] + 0.75 * frame["width"], frame["y"] + 0.5 * frame["height"])
    expect(page.locator(".found:visible button")).to_have_count(1)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy curl").click()
    expect(page.locator("#status")).to_contain_text("large.png in the current folder")
    command = page.evaluate("navigator.clipboard.readText()")
    (((x, y),),) = json.loads(command.split("prompts=")[1].rstrip("'"))["points"]
    assert (x, y) == pytest.approx((0.75 * 3000, 0.5 * 1000), abs=10)
    ran = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["width"] == 3000
    page.get_by_role("button", name="COCO JSON").click()
    expect(page.locator("#status")).to_contain_text("reduced to 2048 x 683 pixels")


def hold(page: "playwright.Page", route: str, act: Callable[[], None]) -> "playwright.Route":
    """A request that an act causes, not answered yet."""
    held: list[Any] = []
    page.route(f"**{route}", lambda asked: held.append(asked), times=1)
    act()
    for _ in range(500):
        page.wait_for_timeout(20)
        if held:
            return held[0]
    raise AssertionError(f"no request to {route}")


def answer_late(page: "playwright.Page", held: "playwright.Route", field: str) -> None:
    """Answer a held request; the page no longer waits for it, so nothing is shown."""
    entry = {"box": [0, 0, 9, 9], "label": "stale", "score": 0.99, "iou": 0.99}
    with contextlib.suppress(playwright.Error):  # the page has given it up
        held.fulfill(json={"width": 128, "height": 128, field: [entry]})
    page.wait_for_timeout(300)
    expect(page.locator(".found:visible .name", has_text="stale")).to_have_count(0)


@pytest.mark.slow
def test_the_answer_to_an_earlier_picture_or_to_earlier_names_is_not_shown(page: "playwright.Page") -> None:
    held = hold(page, "/v1/detect", page.get_by_label("Sample picture 2").click)
    page.get_by_label("Sample picture 3").click()
    expect(page.locator("#status")).to_contain_text("result")
    answer_late(page, held, "detections")

    def add(name: str) -> None:
        page.get_by_label("Names: add a name").fill(name)
        page.get_by_label("Names: add a name").press("Enter")

    held = hold(page, "/v1/detect", lambda: add("anchor"))
    add("snowman")
    expect(page.locator("#status")).to_contain_text("result")
    answer_late(page, held, "detections")


@pytest.mark.slow
def test_prompts_sent_while_another_picture_opens_are_of_the_earlier_one(page: "playwright.Page") -> None:
    choose(page, "Click")
    page.locator("canvas:visible").click()
    expect(page.locator(".found:visible button")).to_have_count(1)
    page.evaluate(
        """() => {
          const open = createImageBitmap, wait = (seconds) => new Promise((wake) => setTimeout(wake, 1000 * seconds));
          window.createImageBitmap = async (blob) => (await wait(1), open(blob));
        }"""
    )
    page.get_by_label("Sample picture 2").click()
    held = hold(page, "/v1/segment", page.locator("canvas:visible").click)
    expect(page.locator("#status")).to_contain_text("Click on something")
    answer_late(page, held, "segments")


@pytest.mark.slow
def test_a_finger_scrolls_the_page_unless_it_points_and_a_zoom_gives_no_prompt(page: "playwright.Page") -> None:
    canvas = page.locator("canvas:visible")
    touch = "(canvas) => getComputedStyle(canvas).touchAction"
    assert canvas.evaluate(touch) == "auto"
    choose(page, "Click")
    assert canvas.evaluate(touch) == "pinch-zoom"
    expect(page.locator("#status")).not_to_contain_text("Looking")
    for kind in ("pointermove", "pointercancel", "pointerup"):
        place = {"pointerId": 1, "isPrimary": True, "button": 0, "clientX": 400, "clientY": 400, "bubbles": True}
        if kind == "pointermove":
            page.mouse.move(500, 300)
            page.mouse.down()
        canvas.dispatch_event(kind, place)
    page.mouse.up()
    page.wait_for_timeout(300)
    expect(page.locator(".found:visible button")).to_have_count(0)


@pytest.mark.slow
def test_the_same_file_can_be_chosen_again(page: "playwright.Page") -> None:
    for _ in range(2):
        with page.expect_request("**/v1/detect"):
            page.locator("#file").set_input_files(WEB / "samples" / "scene-2.jpg")
        expect(page.locator("#status")).to_contain_text("result")
        assert page.locator("#file").input_value() == ""


@pytest.mark.parametrize("path", ["/", "/docs"])
@pytest.mark.parametrize(
    "width", ["phone", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tablet", "desk"))]
)
def test_nothing_is_wider_than_the_screen(browser: "playwright.Browser", url: str, width: str, path: str) -> None:
    context = browser.new_context(viewport={"width": WIDTHS[width][0], "height": WIDTHS[width][1]})
    page = context.new_page()
    page.goto(url + path)
    expect(page.locator("canvas:visible, article").first).to_be_visible()
    expect(page.locator("#status:has-text('result'), article").first).to_be_visible()
    sizes = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    context.close()
    assert sizes[0] <= sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_axe_finds_nothing_serious(
    browser: "playwright.Browser", url: str, scheme: str, path: str, tmp_path: Path
) -> None:
    """axe-core comes from npm."""
    if not shutil.which("npm"):
        pytest.skip("needs npm")
    packed = subprocess.run(["npm", "pack", "--silent", "axe-core"], cwd=tmp_path, capture_output=True, text=True)
    if packed.returncode:
        pytest.skip("npm reaches no registry")
    with tarfile.open(tmp_path / packed.stdout.strip()) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        axe = member.read().decode()
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(url + path)
    expect(page.locator("#status:has-text('result'), article").first).to_be_visible()
    page.evaluate(axe)
    violations = page.evaluate("axe.run().then((found) => found.violations)")
    context.close()
    serious = [entry for entry in violations if entry["impact"] in ("serious", "critical")]
    assert [(entry["id"], [node["html"] for node in entry["nodes"]]) for entry in serious] == []
