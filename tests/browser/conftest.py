"""A real JupyterLab on localhost, and a real Chromium that sees nothing but localhost and local files."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = "01_affine_quantization.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page whose requests to any other machine are refused; an exception in a script fails the test."""
    context = browser.new_context(viewport={"width": 1300, "height": 1000})
    here = ("http://127.0.0.1:", "file:", "data:", "blob:")
    context.route(lambda url: not url.startswith(here), lambda route: route.abort())
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert not [e for e in errors if "qlab" in e or "explore" in e], errors


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Environment variables that keep Jupyter's own files in a scratch folder."""
    home = tmp_path_factory.mktemp("jupyter")
    folders = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    overrides = home / "config" / "labconfig" / "default_setting_overrides.json"
    overrides.parent.mkdir(parents=True)
    quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    overrides.write_text(json.dumps(quiet))
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    return {
        **os.environ, **folders, "IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip


@pytest.fixture(scope="session")
def jupyter(environment):
    """jupyter("trust", path) runs a Jupyter command in the scratch environment."""

    def run(*words):
        subprocess.run(
            [sys.executable, "-m", "jupyter", *map(str, words)], check=True, env=environment, capture_output=True
        )

    return run


class Lab:
    def __init__(self, folder, url, token):
        self.folder, self.url, self.token = folder, url, token

    def open(self, page, name):
        """Open a notebook of `folder` and wait until its kernel is idle."""
        page.goto(f"{self.url}/lab/tree/{name}?token={self.token}&reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
        page.wait_for_function(
            "() => jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=90_000
        )

    def run_all(self, page):
        """Run all cells and wait until each has been counted and the kernel is idle."""
        page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_function(
            """() => {
              const panel = jupyterapp.shell.currentWidget;
              return [...panel.content.model.cells].every(c => c.type !== "code" || c.executionCount > 0)
                && panel.sessionContext.session.kernel.status === "idle";
            }""",
            timeout=120_000,
        )


@pytest.fixture(scope="session")
def lab(tmp_path_factory, environment, browser):
    folder = tmp_path_factory.mktemp("notebooks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, url = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly",
        *(["--allow-root"] if os.getuid() == 0 else []),
    ]  # fmt: skip
    log = (folder.parent / "lab.log").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/api?token={token}", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, (folder.parent / "lab.log").read_text()
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not answer within two minutes")
        yield Lab(folder, url, token)
    finally:
        server.terminate()
        server.wait(30)
        log.close()
