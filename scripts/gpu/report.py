"""What the steps of scripts/gpu-check found: one JSON and one table.

    report.py step FILE NAME EXIT_CODE SECONDS LIMIT OUTPUT    appends a step
    report.py report DIR                                       writes DIR/check.json and DIR/check.md, and prints the table
"""
import json
import pathlib
import subprocess
import sys

SKIPPED, TIMED_OUT = 77, (124, 137)


def read(path, default=None):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return default


def step(file, name, rc, seconds, limit, output):
    lines = pathlib.Path(output).read_text(errors="replace").strip().splitlines()
    state = {0: "passed", SKIPPED: "skipped"}.get(rc, "timed out" if rc in TIMED_OUT else "failed")
    path = pathlib.Path(file)
    steps = read(path, [])
    steps.append({"step": name, "state": state, "exit_code": rc, "seconds": seconds, "limit_seconds": limit,
                  "end": [line[:300] for line in lines[-5:]]})
    path.write_text(json.dumps(steps, indent=1) + "\n")


def gpu():
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    try:
        text = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True,
                              text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(query.split(","), [value.strip() for value in text.splitlines()[0].split(",")]))


def speeds(directory):
    """Rows of decode and prefill: this program, then its peers."""
    rows = []
    bench = read(directory / "bench.json")
    if bench and not bench["emulated"]:
        for kind, what in (("decode", "decode at"), ("prefill", "prefill")):
            for row in bench[kind]:
                share = f"{100 * row['share']:.1f}% of the floor" if row.get("share") else ""
                rows.append((f"aoji, {what} {row['tokens']}", f"{row['p50_ms']:.3f}", f"{row['p99_ms']:.3f}", share))
    peers = read(directory / "peers.json", {})
    for arm, label in (("fast", "torch.compile"), ("hf_static", "transformers, static cache, compiled"),
                       ("hf_eager", "transformers, eager")):
        result = peers.get(arm, {})
        for kind, key, what in (("decode", "depth", "decode at"), ("prefill", "tokens", "prefill")):
            for row in result.get(kind, []):
                rows.append((f"{label}, {what} {row[key]}", f"{row['ms_p50']:.3f}", f"{row['ms_p99']:.3f}", ""))
    return rows


def report(directory):
    steps = [dict(s, part=p) for p in range(1, 10) for s in read(directory / f"steps-{p}.json", [])]
    doctor = read(directory / "doctor.json", {})
    old = read(directory / "check.json", {})
    emulated = any(g["name"] == "CUDA emulator" for g in doctor.get("gpus", []))
    result = {"gpu": gpu() or old.get("gpu"), "emulated": emulated, "commit": doctor.get("commit"), "steps": steps}
    hf = read(directory / "hf.json")
    (directory / "check.json").write_text(json.dumps(dict(result, hugging_face=hf), indent=1) + "\n")

    name = doctor["gpus"][0]["name"] if doctor.get("gpus") else "no GPU"
    lines = [f"# GPU check: {name}, commit {doctor.get('commit') or 'unknown'}", ""]
    if emulated:
        lines += ["A dry run on the emulated device: nothing here was measured on a GPU.", ""]
    lines += ["| part | step | result | seconds |", "|---|---|---|---|"]
    for s in steps:
        why = f": {s['end'][-1].removeprefix('skipped: ')}" if s["state"] != "passed" and s["end"] else ""
        lines.append(f"| {s['part']} | {s['step']} | {s['state']}{why.replace('|', '/')} | {s['seconds']} |")
    if hf:
        lines += ["", "| against transformers in float32 | mean error of log-probabilities | p99 | other top token |",
                  "|---|---|---|---|"]
        for who in ("aoji", "hf_bfloat16"):
            if who in hf:
                r = hf[who]
                lines.append(f"| {who} | {r['mean_error']:.4f} | {r['p99_error']:.4f} | {r['other_top']} of {r['places']} |")
    evaluation, hf = read(directory / "eval.json"), read(directory / "hf_eval.json")
    if evaluation:
        e, share = evaluation, evaluation["tokens_computed"] / evaluation["tokens_asked"]
        lines += ["", f"KoBEST, {e['shots']} shots: {e['requests']} requests in {e['seconds']:.1f} s, {share:.1%} of "
                      f"{e['tokens_asked']} tokens computed, {e['requests_per_second']:.1f} requests/s"]
        if hf:
            lines[-1] += (f"; the harness's loop on transformers: {hf['requests_per_second']:.1f} requests/s "
                          f"({hf['requests']} requests)")
    rows = speeds(directory)
    if rows:
        lines += ["", "| | ms p50 | ms p99 | |", "|---|---|---|---|"] + [f"| {' | '.join(row)} |" for row in rows]
    text = "\n".join(lines) + "\n"
    (directory / "check.md").write_text(text)
    print(text, end="")


if sys.argv[1] == "step":
    step(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]), sys.argv[7])
else:
    report(pathlib.Path(sys.argv[2]))
