"""The page tells readers nothing but voxels, shows them as they are, and a real browser can be played through it."""

import base64
import contextlib
import json
import random
import re
import shutil
import subprocess
import time
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from hrldm.config import SUBTYPES
from study.readers import page, score
from tests import tiny

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESK = (390, 844, True), (1280, 800, False)


def nodules(n: int, seed: int, side: int = 42, ids: str = "n"):
    """Phantoms of all subtypes and sizes; their number along the first axis of voxels tells which is which."""
    made = tiny.patches(n, side, seed)
    diameters = np.resize(np.repeat([8.0, 15.0, 25.0], 3), n)
    return replace(made, frame=made.frame.assign(diameter_mm=diameters, nodule_id=[f"{ids}{i}" for i in range(n)]))


def made(folder: Path, seed: int = 3) -> Path:
    """A page with 6 + 6 cases; the synthetic ones are smooth and compress well."""
    real, synthetic = nodules(18, 0), nodules(18, 1)
    return page.make(real, replace(synthetic, hu=synthetic.hu // 8 - 750), folder, n=6, seed=seed)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Folder of a page and its key."""
    return made(tmp_path_factory.mktemp("study") / "out").parent


# -- what is chosen, and what the file tells ---------------------------------------------------------------------------


def test_kinds_are_balanced_over_subtypes_and_sizes_and_no_nodule_is_on_both_sides(tmp_path):
    real, synthetic = nodules(18, 0), nodules(18, 1)
    key = score.read_key(page.make(real, synthetic, tmp_path / "out", n=9, system="hr-ldm").parent / page.KEY)
    counts = pd.crosstab([key.subtype, key.size_mm], key.truth)
    assert counts.shape == (9, 2) and (counts == 1).all(axis=None)
    assert not key.nodule_id.duplicated().any()
    assert set(key[key.truth == "synthetic"].system) == {"hr-ldm"} and set(key[key.truth == "real"].system) == {""}


def test_cells_with_few_nodules_are_made_up_for_by_others_and_what_is_shared_is_divided():
    rng = np.random.default_rng(0)
    real = nodules(18, 0).frame
    few = real.drop(index=[0, 9])  # solid, 6-10 mm: none is synthetic
    rows = page.chosen(real, few, 8, rng)
    assert [len(r) for r in rows] == [8, 8]
    assert set(real.nodule_id.iloc[rows[0]]).isdisjoint(few.nodule_id.iloc[rows[1]])
    only = real.assign(nodule_id=real.nodule_id.where(real.index < 9, "other"))
    only["nodule_id"] = [f"{name}{i}" if name == "other" else name for i, name in enumerate(only.nodule_id)]
    rows = page.chosen(real, only, 9, rng)  # each cell: a shared nodule and one of each side's own
    assert set(real.nodule_id.iloc[rows[0]]).isdisjoint(only.nodule_id.iloc[rows[1]])


@pytest.mark.parametrize(
    ("sides", "n", "message"),
    [
        ((42, 42), 10, "10 real and 10 synthetic nodules wanted, 9 of each"),
        ((40, 40), 3, "crops of 40 and 40 mm"),
        ((42, 40), 3, "crops of 42 and 40 mm"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, sides, n, message):
    real, synthetic = (nodules(18, seed, side) for seed, side in enumerate(sides))
    with pytest.raises(ValueError, match=message):
        page.make(real, synthetic, tmp_path / "out", n)
    assert not list(tmp_path.iterdir())


def test_a_former_key_is_never_replaced(study):
    with pytest.raises(ValueError, match="its key belongs to a page"):
        page.make(nodules(18, 0), nodules(18, 1), study, n=6)


def test_the_page_holds_the_voxels_within_one_step(study):
    key, shown = score.read_key(study / page.KEY).set_index("case"), volumes(study / page.PAGE)
    real = nodules(18, 0)
    for case, row in key[key.truth == "real"].iterrows():
        lost = real.hu[int(row.nodule_id[1:])].clip(page.LOWEST_HU) - shown[case]
        assert ((lost >= 0) & (lost < page.STEP_HU)).all()


def test_nothing_in_the_file_tells_the_truth(study, tmp_path, monkeypatch):
    text, key = (study / page.PAGE).read_text(), score.read_key(study / page.KEY)
    codes = dict(re.findall(r'id="case-(\d+)">(.*?)</script>', text))
    assert list(codes) == sorted(key.case) and len({*map(len, codes.values())}) == 1
    rest = re.sub(r'(?s)<style>.*?</style>|id="case-\d+">.*?</script>', "", text)
    for word in (*key.nodule_id, *SUBTYPES, "hr-ldm", "diameter"):
        assert not re.search(rf"\b{word}\b", rest), word
    order = json.loads(re.search(r'id="study">(.*?)</script>', text)[1])["order"]
    assert order["cropped"] != order["full_context"] and sorted(order["cropped"]) == sorted(order["full_context"])
    assert "http" not in rest.replace("http-equiv", "")
    # over many pages a case's number and its place say no more than a coin
    monkeypatch.setattr(page, "_packed", lambda hu: b"")
    keys = []
    for seed in range(8):
        file = made(tmp_path / str(seed), seed)
        order = json.loads(re.search(r'id="study">(.*?)</script>', file.read_text())[1])["order"]
        key = score.read_key(file.parent / page.KEY)
        keys.append(key.assign(**{c: key.case.map(order[c].index) for c in order}, number=key.case.astype(int)))
    table = pd.concat(keys)
    for column in ("number", "cropped", "full_context"):
        assert abs(roc_auc_score(table.truth == "real", table[column]) - 0.5) < 0.15, column


def test_a_systems_crops_are_set_into_the_wider_field(monkeypatch):
    wide, narrow = nodules(4, 0, 48), nodules(4, 0, 48).centred(40)
    healthy = replace(wide, hu=np.full_like(wide.hu, -900))
    monkeypatch.setattr(page, "evaluation_nodules", lambda study: (narrow[:3], healthy.centred(40)[:3]))
    monkeypatch.setattr(page, "request_for", lambda *_, seed: None)
    monkeypatch.setattr(page, "synthesise", lambda *_: narrow.hu[:3])
    study = SimpleNamespace(seed=0, places=lambda *_: (wide, healthy))
    real, synthetic = page.study_nodules(study, "hr-ldm", 48)
    assert len(real) == len(synthetic) == 3
    assert (real.hu == wide.hu[:3]).all() and (synthetic.centred(40).hu == narrow.hu[:3]).all()
    assert (synthetic.hu[:, :4] == -900).all() and (synthetic.hu[..., 44:] == -900).all()


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(study, tmp_path):
    files = [made(tmp_path / str(seed), seed) for seed in (3, 4)]
    same, other = (f.read_bytes() == (study / page.PAGE).read_bytes() for f in files)
    assert same and not other


def test_padded_sides_of_one_kind_are_reported(caplog):
    real, synthetic = (page._padded(nodules(18, seed).hu) for seed in (0, 1))
    page._report_padding(real, synthetic)
    assert not caplog.records
    hu = nodules(18, 0).hu
    hu[:, :3] = hu[:, 3:4]
    page._report_padding(page._padded(hu), synthetic)
    assert "18 of 18 real and 0 of 18 synthetic crops reach beyond their scan" in caplog.text


# -- played through ----------------------------------------------------------------------------------------------------


class Browser:
    """A headless Chromium, driven over its DevTools protocol: real keys, clicks and touches."""

    def __init__(self, folder: Path, width: int, height: int, phone: bool):
        import websocket

        self.downloads, self.count, self.phone = folder / "downloads", 0, phone
        options = "--headless=new --no-sandbox --disable-gpu --no-first-run --remote-debugging-port=0".split()
        self.process = subprocess.Popen(
            [CHROMIUM, *options, f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port = waited(lambda: (folder / "DevToolsActivePort").read_text().split()[0])
        tabs = waited(lambda: json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json")))
        tab = next(t for t in tabs if t["type"] == "page")
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], suppress_origin=True, timeout=30)
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Emulation.setTouchEmulationEnabled", enabled=phone)
        self("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def __call__(self, method: str, **params):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while (reply := json.loads(self.socket.recv())).get("id") != self.count:
            pass
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def open(self, file: Path) -> None:
        self("Page.navigate", url=file.resolve().as_uri())
        waited(lambda: self.js("document.readyState === 'complete' && !document.getElementById('intro').hidden"))

    def js(self, code: str):
        reply = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def key(self, *keys: str) -> None:
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            code = {"Enter": 13, "Backspace": 8}.get(key, 0)
            self("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
            self("Input.dispatchKeyEvent", type="keyUp", key=key)

    def press(self, selector: str) -> None:
        """Touch (phone) or click the middle of an element, which must be in sight."""
        find = f"(e => (e.scrollIntoViewIfNeeded(), e.getBoundingClientRect()))(document.querySelector('{selector}'))"
        box = json.loads(self.js(f"JSON.stringify({find})"))
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        if self.phone:
            self("Input.dispatchTouchEvent", type="touchStart", touchPoints=[place])
            self("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            return
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def start(self, file: Path, reader: str = "") -> None:
        self.open(file)
        if reader:
            self.js("document.getElementById('reader').focus()")
            self("Input.insertText", text=reader)
        self.press("#intro button")
        self.go_on()

    def go_on(self) -> None:
        waited(lambda: not self.js("byId('pause').hidden"))
        self.press("#continue")
        waited(lambda: self.js("ticking !== null"))

    def shown(self) -> None:
        """Wait until a case, a pause or the end is on the screen."""
        waited(lambda: self.js("!byId('end').hidden || !byId('pause').hidden || ticking !== null"))

    def answer(self, answer: str, confidence: int) -> None:
        if self.phone:
            for selector in (f"[data-answer={answer}]", f'[data-confidence="{confidence}"]', "#next"):
                self.press(selector)
        else:
            self.key("1" if answer == "real" else "2", str(confidence), "Enter")
        self.shown()

    def play(self, answers) -> None:
        """Answer what is left, until `answers` end."""
        for answer, confidence in answers:
            if not self.js("byId('pause').hidden"):
                self.go_on()
            self.answer(answer, confidence)

    def readings(self, reader: str) -> Path:
        waited(lambda: list(self.downloads.glob(f"readings-{reader}-*.csv")))
        return next(self.downloads.glob(f"readings-{reader}-*.csv"))

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))


def waited(ask, seconds: float = 20):
    """The first true answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, IndexError):
            if found := ask():
                return found
        time.sleep(0.02)
    raise TimeoutError("the browser did not get there")


@contextlib.contextmanager
def browser(folder: Path, size=DESK):
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH: the page is not played through")
    pytest.importorskip("websocket", reason="websocket-client (of jupyterlab) drives the browser")
    made = None
    try:
        made = Browser(folder, *size)
        yield made
    finally:
        if made:
            made.process.terminate()
            made.process.wait(10)


def accuracy(file: Path, study: Path) -> pd.Series:
    table = score.score([file], study / page.KEY)["readers_accuracy"]
    return table[(table.nodules == "all") & (table.quantity == "accuracy")].set_index("condition")["value"]


def test_played_at_a_desk_with_keys_stopped_reloaded_and_scored(study, tmp_path):
    with browser(tmp_path / "profile") as b:
        b.start(study / page.PAGE, "all-real")
        b.play([("real", 4)] * 8)
        b.key("1")  # an answer without its confidence is kept too
        b.start(study / page.PAGE)  # the id is remembered
        assert b.js("byId('position').textContent") == "9 / 12"
        assert b.js("state.draft.answer") == "real"
        b.key("Enter")  # nothing yet: how sure?
        assert b.js("byId('position').textContent") == "9 / 12"
        b.key("Backspace")
        b.play([("real", 4)] * 16)
        file = b.readings("all-real")
    assert accuracy(file, study).tolist() == [0.5, 0.5]
    table = pd.read_csv(file, dtype={"case": str})
    assert table.phase.value_counts().to_dict() == {"cropped": 12, "full_context": 12}
    assert (table.confidence == 4).all() and table.seconds.between(0, 20).all() and table.seconds.max() > 0


def test_played_on_a_phone_by_touch_all_synthetic(study, tmp_path):
    with browser(tmp_path / "profile", PHONE) as b:
        b.start(study / page.PAGE, "all-synthetic")
        assert b.js("document.documentElement.scrollWidth") <= PHONE[0]
        for selector in ("#next", "[data-answer=real]", "#main"):  # in sight without scrolling
            assert b.js(f"document.querySelector('{selector}').getBoundingClientRect().bottom") <= PHONE[1]
        b.play([("synthetic", 1)] * 24)
        file = b.readings("all-synthetic")
    assert accuracy(file, study).tolist() == [0.5, 0.5]


def test_the_browser_shows_the_voxels_and_scrolls_zooms_and_windows_them(study, tmp_path):
    rng, shown = random.Random(1), volumes(study / page.PAGE)
    with browser(tmp_path / "profile") as b:
        b.start(study / page.PAGE, "at-random")
        b.play([(rng.choice(["real", "synthetic"]), rng.randint(1, 5)) for _ in range(12)])
        b.go_on()
        case = shown[b.js("caseNow()")]
        on_page = np.array(b.js("[...volume.data]")).reshape(case.shape) * page.STEP_HU + page.LOWEST_HU
        assert (on_page == case[::-1, ::-1, ::-1].T).all()
        window = np.floor((case[::-1, ::-1, ::-1].T[21] + 1350.0) * 256 / 1500).clip(0, 255)
        grey = "slicePicture(0).getContext('2d').getImageData(0, 0, 42, 42).data"
        assert (np.array(b.js(f"[...{grey}]"))[::4].reshape(42, 42) == window).all()
        b.key("ArrowDown", "ArrowDown", "ArrowUp", "p", "ArrowUp", "w", "+", "+")
        view = b.js("view")
        assert (view["slices"], view["plane"], view["level"], view["width"]) == ([22, 20, 21], 1, 40, 400)
        assert view["zoom"] == pytest.approx(1.5625)
        b.key("0")
        place = {"x": 400, "y": 400}
        b("Input.dispatchMouseEvent", type="mouseWheel", deltaX=0, deltaY=120, **place)
        waited(lambda: b.js("view.slices[1]") == 23)
        assert b.js("view.zoom") == 1
        b.play([(rng.choice(["real", "synthetic"]), rng.randint(1, 5)) for _ in range(12)])
        file = b.readings("at-random")
    tables = score.score([file], study / page.KEY)
    table = tables["readers_accuracy"].query("nodules == 'all' and quantity == 'accuracy'")
    assert (table.p_chance > 0.05).all() and table.value.between(0.2, 0.8).all()


def test_a_browser_without_what_is_needed_says_so(study, tmp_path):
    with browser(tmp_path / "profile") as b:
        b("Page.enable")
        gone = "delete window.DecompressionStream; Object.defineProperty(window, 'localStorage', {get() { throw 1 }})"
        b("Page.addScriptToEvaluateOnNewDocument", source=gone)
        b("Page.navigate", url=(study / page.PAGE).resolve().as_uri())
        waited(lambda: b.js("document.readyState === 'complete'"))
        assert "cannot unpack the images" in b.js("document.getElementById('warning').textContent")
        assert b.js("document.getElementById('intro').hidden")


def volumes(file: Path) -> dict[str, np.ndarray]:
    """Case -> (D, D, D) int16 HU as the page holds them."""
    text = file.read_text(encoding="utf-8")
    side = json.loads(re.search(r'id="study">(.*?)</script>', text)[1])["side"]
    found = {}
    for case, code in re.findall(r'id="case-(\d+)">(.*?)</script>', text):
        raw = np.frombuffer(zlib.decompress(base64.b64decode(code), -15), np.uint8)[: 2 * side**3].astype(np.int32)
        folded = raw[: side**3] << 8 | raw[side**3 :]
        steps = ((folded >> 1) ^ -(folded & 1)).reshape(side, side, side)
        for axis in range(3):
            steps = steps.cumsum(axis)
        found[case] = (page.LOWEST_HU + page.STEP_HU * steps[::-1, ::-1, ::-1].T).astype(np.int16)
    return found
