"""The picture of a study on many targets for the documentation: fronts and regret matrix, as SVG.

    python docs/make_targets_picture.py [--home mlruns] [--study ID] [--out docs/pictures]

The picture is the report's own, which plotly.js writes as targets.svg in headless Chromium; nothing is measured or
predicted. Exit codes are those of `paretune`: 2 without a study that has further targets, 5 without browser or Playwright.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import urllib.parse
from pathlib import Path
from types import ModuleType
from typing import Any

from paretune.common.errors import ParetuneError, UsageError
from paretune.search.recommend.compare import Comparison, compare
from paretune.search.study.store import Store
from paretune.search.study.view import load_view
from paretune.tracking.charts.targets_picture import targets_figure

HERE = Path(__file__).resolve().parent
WIDTH = 1100
WRITE = "([data, layout, width, height]) => Plotly.toImage({data, layout}, {format: 'svg', width, height})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path("mlruns"), help="where the study lives")
    parser.add_argument("--study", help="id of the study; the latest one with further targets if left out")
    parser.add_argument("--out", type=Path, default=HERE / "pictures", help="folder to fill")
    parser.add_argument("--browser", default="/usr/bin/chromium", help="path of Chromium")
    arguments = parser.parse_args()
    try:
        found = find_comparison(arguments.home.resolve(), arguments.study)
        arguments.out.mkdir(parents=True, exist_ok=True)
        with _pictures().open_browser(arguments.browser) as browser:
            draw(browser, found, arguments.out / "targets.svg")
    except ParetuneError as error:
        print(f"error: {error.problem}\nremedy: {error.remedy}", file=sys.stderr)
        return error.exit_code
    return 0


def find_comparison(home: Path, wanted: str | None) -> Comparison:
    """The targets of the wanted or the latest study that has some. Raises UsageError if there is none."""
    found = sorted((home / "studies").glob("*/study.db"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in (path.parent for path in found if wanted in (None, path.parent.name)):
        store = Store.reader(folder)
        try:
            comparison = compare(load_view(store))
        finally:
            store.close()
        if comparison is not None:
            return comparison
    raise UsageError(
        f"there is no study {wanted or ''} with further targets in {home / 'studies'}".replace("  ", " "),
        "add one with `paretune targets --profile NAME`",
    )


def draw(browser: Any, found: Comparison, file: Path) -> None:
    """Write the figure on white as SVG."""
    from plotly.offline import get_plotlyjs

    figure = targets_figure(found)
    figure.update_layout(paper_bgcolor="#ffffff", plot_bgcolor="#ffffff", font={"color": "#3c454d"})
    page = browser.new_page()
    page.add_script_tag(content=get_plotlyjs())
    plain = json.loads(figure.to_json())
    address = page.evaluate(WRITE, [plain["data"], plain["layout"], WIDTH, figure.layout.height])
    page.close()
    file.write_text(urllib.parse.unquote(address.partition(",")[2]), "utf8")
    print(f"{file} ({file.stat().st_size / 1000:.0f} kB)")


def _pictures() -> ModuleType:
    """The script beside this one, which knows how to open a browser."""
    spec = importlib.util.spec_from_file_location("make_pictures", HERE / "make_pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
