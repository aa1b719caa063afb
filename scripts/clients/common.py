"""Shared code for the checks of clients: each gets its own packages and a server, and prints a line for each check.

Each script is one command. It installs its pinned packages into target/clients, starts `aoji serve` with the demo model on a free
port, prints a line for each check, and exits with 0 if all of them pass.

  AOJI       the command [default: target/release/aoji, built first]
  AOJI_URL   a server that runs already, like http://127.0.0.1:8080; its key, if it has one, is AOJI_API_KEY
"""
import atexit
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOME = ROOT / "target/clients"
PASSED, FAILED = [], []


def packages(venv, *pinned):
    """Restarts the script in an environment of its own that has these packages."""
    venv = HOME / venv
    if pathlib.Path(sys.prefix) == venv:
        return
    installed = venv / "installed"
    if not installed.exists() or installed.read_text() != " ".join(pinned):
        # Not --clear: pip then takes what is there already.
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin/python", "-m", "pip", "install", "-q", *pinned], check=True)
        installed.write_text(" ".join(pinned))
    sys.stdout.flush()
    os.execv(venv / "bin/python", [str(venv / "bin/python"), *sys.argv])


def node(folder, script, dependencies):
    """Installs npm packages, and returns how to run a script that imports them."""
    folder = HOME / folder
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.dumps({"private": True, "type": "module", "dependencies": dependencies}, indent=1)
    manifest = folder / "package.json"
    if not manifest.exists() or manifest.read_text() != wanted or not (folder / "node_modules").exists():
        manifest.write_text(wanted)
        npm = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(npm, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    shutil.copy(pathlib.Path(__file__).parent / script, folder)  # packages are looked for beside the script
    own = folder / "node_modules/node/bin/node"
    return [str(own) if own.exists() else "node", str(folder / script)]


class Site:
    """A server, started here unless AOJI_URL names one."""

    def __init__(self, name, *arguments, model="demo", key="secret-of-the-checks"):
        self.process = None
        self.log = HOME / f"{name}.log"
        self.url = os.environ.get("AOJI_URL", "").rstrip("/").removesuffix("/v1")
        self.key = os.environ.get("AOJI_API_KEY") if self.url else key
        if not self.url:
            self.start([command(), "serve", "-m", model, "--port", "0", *arguments])
        self.model = self.get("/v1/models")["data"][0]["id"]

    def start(self, line):
        HOME.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if k != "AOJI_API_KEY"}
        if self.key:
            environment["AOJI_API_KEY"] = self.key
        self.process = subprocess.Popen(line, stderr=open(self.log, "w"), env=environment)
        atexit.register(self.stop)
        while not (address := re.search(r"listening on (http://\S+)", self.log.read_text())):
            if self.process.poll() is not None:
                sys.exit(f"aoji serve did not start:\n{self.log.read_text()}")
            time.sleep(0.05)
        self.url = address[1]

    def stop(self):
        """Sends SIGTERM, after which the server must end by itself. Returns its exit code."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)
        return self.process.returncode

    def call(self, path, body=None, timeout=120):
        """Status and text of a reply."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, path, body=None):
        """The JSON of a reply, which must be a success."""
        status, text = self.call(path, body)
        assert status == 200, f"{path}: {status} {text}"
        return json.loads(text)

    def metric(self, name):
        """A number of /metrics; 0 for one that has not been counted yet."""
        found = re.search(rf"^aoji:{re.escape(name)} (\S+)$", self.call("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def idle(self, seconds=30):
        """Waits until no answer runs or waits."""
        end = time.monotonic() + seconds
        while busy := self.metric("num_requests_running") + self.metric("num_requests_waiting"):
            assert time.monotonic() < end, f"{busy} answers after {seconds} s"
            time.sleep(0.02)


def command():
    """The command aoji."""
    if found := os.environ.get("AOJI"):
        return found
    subprocess.run(["cargo", "build", "-q", "--release"], cwd=ROOT, check=True)
    return str(ROOT / "target/release/aoji")


def check(name):
    """Runs a function immediately, as a check; what it returns is printed beside its name."""

    def run(function):
        try:
            said = function()
        except Exception as error:
            FAILED.append(name)
            place = traceback.extract_tb(error.__traceback__)[-1]
            print(f"FAIL  {name}: {type(error).__name__}: {str(error)[:2000]}\n      {place.filename}:{place.lineno}: {place.line}")
        else:
            PASSED.append(name)
            print(f"ok    {name}" + (f": {said}" if said else ""))
        sys.stdout.flush()
        return function

    return run


def raises(kind, function, *arguments, **named):
    """The exception that a call must raise."""
    try:
        answer = function(*arguments, **named)
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, got {answer!r:.500}")


def finish(what):
    """Prints the summary and ends."""
    print(f"{what}: {len(PASSED)} checks passed" + (f", {len(FAILED)} FAILED: {'; '.join(FAILED)}" if FAILED else ""))
    sys.exit(1 if FAILED else 0)
