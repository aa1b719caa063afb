"""Collects what the steps of scripts/gpu-check found into one JSON and one table.

    report.py step FILE NAME EXIT_CODE SECONDS LIMIT OUTPUT    appends a step
    report.py gpu DIR                                          writes DIR/gpu.json: what nvidia-smi says of the GPU
    report.py report DIR                                       writes DIR/check.json and DIR/check.md, and prints the table

A file is replaced completely or not at all, so that the results of earlier steps survive when later ones cannot be written.
"""
import json
import os
import pathlib
import subprocess
import sys

SKIPPED, TIMED_OUT = 77, (124, 137)


def read(path, default=None):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return default


def write(path, text):
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def step(file, name, rc, seconds, limit, output):
    lines = pathlib.Path(output).read_text(errors="replace").strip().splitlines()
    state = {0: "passed", SKIPPED: "skipped"}.get(rc, "timed out" if rc in TIMED_OUT else "failed")
    path = pathlib.Path(file)
    steps = read(path, [])
    steps.append({"step": name, "state": state, "exit_code": rc, "seconds": seconds, "limit_seconds": limit,
                  "end": [line[:300] for line in lines[-5:]]})
    write(path, json.dumps(steps, indent=1) + "\n")


def gpu(directory):
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    try:
        text = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True,
                              text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as e:
        return print(f"no answer from nvidia-smi: {e}")
    values = [value.strip() for value in (text.splitlines() or [""])[0].split(",")]
    write(directory / "gpu.json", json.dumps(dict(zip(query.split(","), values)), indent=1) + "\n")


def speeds(directory):
    """Rows of decode and prefill: this program, then its peers."""
    rows = []
    for name, who in (("bench.json", "aoji"), ("bench-fp8.json", "aoji, cache of fp8")):
        bench = read(directory / name)
        if bench and not bench["emulated"]:
            for kind, what in (("decode", "decode at"), ("prefill", "prefill")):
                for row in bench[kind]:
                    share = f"{100 * row['share']:.1f}% of the floor" if row.get("share") else ""
                    rows.append((f"{who}, {what} {row['tokens']}", f"{row['p50_ms']:.3f}", f"{row['p99_ms']:.3f}", share))
    peers = read(directory / "peers.json", {})
    for arm, label in (("fast", "torch.compile"), ("hf_static", "transformers, static cache, compiled"),
                       ("hf_eager", "transformers, eager")):
        result = peers.get(arm, {})
        for kind, key, what in (("decode", "depth", "decode at"), ("prefill", "tokens", "prefill")):
            for row in result.get(kind, []):
                rows.append((f"{label}, {what} {row[key]}", f"{row['ms_p50']:.3f}", f"{row['ms_p99']:.3f}", ""))
    return rows


def against_transformers(directory):
    hf = read(directory / "hf.json")
    if not hf:
        return []
    lines = ["", "| against transformers in float32 | mean error of log-probabilities | p99 | other top token |", "|---|---|---|---|"]
    for who in ("aoji", "hf_bfloat16"):
        if who in hf:
            r = hf[who]
            lines.append(f"| {who} | {r['mean_error']:.4f} | {r['p99_error']:.4f} | {r['other_top']} of {r['places']} |")
    return lines


def kobest(directory):
    e, hf = read(directory / "eval.json"), read(directory / "hf_eval.json")
    if not e:
        return []
    share = e["tokens_computed"] / e["tokens_asked"]
    line = (f"KoBEST, {e['shots']} shots: {e['requests']} requests in {e['seconds']:.1f} s, {share:.1%} of "
            f"{e['tokens_asked']} tokens computed, {e['requests_per_second']:.1f} requests/s")
    if hf:
        line += (f"; the harness's loop on transformers: {hf['requests_per_second']:.1f} requests/s "
                 f"({hf['requests']} requests)")
    return ["", line]


def speed_table(directory):
    rows = speeds(directory)
    return rows and ["", "| | ms p50 | ms p99 | |", "|---|---|---|---|"] + [f"| {' | '.join(row)} |" for row in rows]


def report(directory):
    steps = [dict(s, part=p) for p in range(10) for s in read(directory / f"steps-{p}.json", [])]
    doctor = read(directory / "doctor.json", {})
    gpus = doctor.get("gpus") or [{"name": "no GPU"}]
    emulated = any(g["name"] == "CUDA emulator" for g in gpus)
    result = {"gpu": read(directory / "gpu.json"), "emulated": emulated, "commit": doctor.get("commit"), "steps": steps,
              "hugging_face": read(directory / "hf.json")}

    lines = [f"# GPU check: {gpus[0]['name']}, commit {doctor.get('commit') or 'unknown'}", ""]
    if emulated:
        lines += ["A dry run on the emulated device: nothing here was measured on a GPU.", ""]
    lines += ["| part | step | result | seconds |", "|---|---|---|---|"]
    for s in steps:
        why = f": {s['end'][-1].removeprefix('skipped: ')}" if s["state"] != "passed" and s["end"] else ""
        lines.append(f"| {s['part']} | {s['step']} | {s['state']}{why.replace('|', '/')} | {s['seconds']} |")
    for part in (against_transformers, kobest, speed_table):
        try:
            lines += part(directory)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as e:  # a result of another form
            lines += ["", f"{part.__name__}: a result cannot be read: {type(e).__name__} {e}"]
    text = "\n".join(lines) + "\n"
    print(text, end="", flush=True)  # also where neither file can be written
    write(directory / "check.md", text)
    write(directory / "check.json", json.dumps(result, indent=1) + "\n")


if sys.argv[1] == "gpu":
    gpu(pathlib.Path(sys.argv[2]))
elif sys.argv[1] == "step":
    step(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]), sys.argv[7])
else:
    report(pathlib.Path(sys.argv[2]))
