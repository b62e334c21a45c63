"""The tab Evaluate: start an evaluation of the served network, watch it, compare what came out, read the report."""

import html
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import gradio as gr

from demo.client import Served
from demo.parts import Parts

ROUTE = "/v1/evaluations"
EVERY_S = 2.0
SHOWN_RUNS = 30


@dataclass(frozen=True)
class EvaluateTab:
    """What its events do."""

    served: Served

    def choices(self) -> tuple[Any, Any, str]:
        """Evaluators and data that the server offers now, and words for what is missing."""
        listing = self.served.get(ROUTE)
        offered, unable = self._evaluators(listing)
        data = listing["data"]
        says = [] if data else ["This server has no data to evaluate on. Start it with `--evaluation-data NAME=PATH`."]
        says += [f"*{name}* cannot run: {reason}." for name, reason in unable]
        first = offered[0][1] if offered else None
        return (
            gr.Dropdown(choices=offered, value=first),
            gr.Dropdown(choices=data, value=data[0] if data else None),
            "  \n".join(says),
        )

    def _evaluators(self, listing: dict[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Those that can run as (shown, name), and the others as (name, reason)."""
        if "evaluators" in listing:
            known = listing["evaluators"]
            able = [(f"{one['name']}: {one['summary']}", one["name"]) for one in known if one["available"]]
            return able, [(one["name"], one["reason"]) for one in known if not one["available"]]
        schemas = self.served.get("/openapi.json")["components"]["schemas"]
        return [(name, name) for name in schemas["Start"]["properties"]["evaluator"]["enum"]], []

    def start(self, evaluator: str | None, data: str | None) -> tuple[str, str]:
        """Begin an evaluation. Returns its id, and how it stands."""
        if not evaluator or not data:
            raise gr.Error("Choose an evaluator and the data to evaluate on.", print_exception=False)
        run = self.served.post(ROUTE, json={"evaluator": evaluator, "data": data})
        return run["id"], state(run)

    def cancel(self) -> str:
        """Stop what runs. Returns how it stands."""
        running = [run for run in self.served.get(ROUTE)["evaluations"] if run["state"] == "running"]
        for run in running:
            self.served.delete(f"{ROUTE}/{quote(run['id'], safe='')}")
        return "<p>Asked it to stop.</p>" if running else "<p>Nothing is running.</p>"

    def watch(self, seen: str) -> tuple[Any, Any, Any, str]:
        """How the newest run stands, the leaderboard and the choice of reports; what is unchanged since `seen` is left as it is."""
        runs = self.served.get(ROUTE)["evaluations"]
        ended = " ".join(run["id"] + run["state"] for run in runs)
        now = state(runs[0]) if runs else "<p>Nothing was evaluated yet. Choose an evaluator and data, then start.</p>"
        if ended == seen:
            return now, gr.skip(), gr.skip(), seen
        full = [self._full(run) for run in runs[:SHOWN_RUNS] if run["state"] == "done"]
        shown = [(f"{run['evaluator']} on {run['data']}, {when(run)}", run["id"]) for run in full]
        return (
            now,
            leaderboard(full),
            gr.Dropdown(choices=shown, value=shown[0][1] if shown else None, visible=bool(shown)),
            ended,
        )

    def _full(self, run: dict[str, Any]) -> dict[str, Any]:
        return self.served.get(f"{ROUTE}/{quote(run['id'], safe='')}")

    def report(self, run_id: str | None) -> str:
        """The server's report of a run, or what its result holds where it makes none."""
        if not run_id:
            return ""
        run = self._full({"id": run_id})
        if run.get("report"):
            page = html.escape(self.served.picture(run["report"]).decode("utf-8", "replace"))
            return f'<iframe class="report" title="Report of the evaluation" sandbox="" srcdoc="{page}"></iframe>'
        return result_table(run)


def state(run: dict[str, Any]) -> str:
    """HTML: what a run is doing, or how it ended."""
    what = html.escape(f"{run['evaluator']} on {run['data']}")
    if run["state"] == "running":
        share = 100 * run["done"] / run["total"] if run["total"] else 0.0
        doing = html.escape(f"{run['part']} {run['done']} of {run['total']}" if run["total"] else run["part"])
        return (
            f"<p><b>{what}</b> is running: {doing}</p>"
            f'<div class="bar" role="progressbar" aria-label="{what}" aria-valuenow="{share:.0f}" aria-valuemin="0" '
            f'aria-valuemax="100"><div style="width:{share:.1f}%"></div></div>'
        )
    why = f": {html.escape(run['error'])}" if run["error"] else ""
    return f"<p><b>{what}</b> is {run['state']} after {run['seconds']:.1f} s{why}</p>"


def when(run: dict[str, Any]) -> str:
    """The start of a run, to the minute."""
    return str(run["started"])[:16].replace("T", " ")


def headline(run: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and metric that a result leads with."""
    result = run["result"]
    name = result["headline"]
    return name, result["metrics"][name]


def figure(metric: dict[str, Any]) -> str:
    """A metric in words: a share in per cent, anything else with its unit; and its interval."""
    scale, unit = (1.0, f" {metric['unit']}") if metric.get("unit") else (100.0, " %")
    interval = metric.get("ci95")
    spread = f" ({scale * interval[0]:.1f} to {scale * interval[1]:.1f})" if interval else ""
    return f"{scale * metric['value']:.1f}{unit}{spread}"


def leaderboard(runs: list[dict[str, Any]]) -> str:
    """HTML: of each evaluator and data a table, the best first."""
    if not runs:
        return ""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["evaluator"], run["data"]), []).append(run)
    parts = []
    for (evaluator, data), members in sorted(groups.items()):
        name, first = headline(members[0])
        up = first.get("lower_is_better", False)
        members.sort(key=lambda run: headline(run)[1]["value"], reverse=not up)
        rows = "".join(
            f"<tr><td>{place}</td><td>{html.escape(network(run))}</td><td>{figure(headline(run)[1])}</td>"
            f"<td>{headline(run)[1].get('n', '')}</td><td>{when(run)}</td></tr>"
            for place, run in enumerate(members, start=1)
        )
        title = html.escape(f"{evaluator} on {data}: {name}{', lower is better' if up else ''}")
        parts.append(
            f"<table><caption>{title}</caption><thead><tr><th></th><th>network</th><th>{html.escape(name)} (95 %)</th>"
            f"<th>images</th><th>when</th></tr></thead><tbody>{rows}</tbody></table>"
        )
    return "".join(parts)


def network(run: dict[str, Any]) -> str:
    """What tells one served network from another: its kind and the beginning of its weights' hash."""
    model = run["result"]["model"]
    kind = model.get("architecture", {}).get("family", "network")
    return f"{kind} {str(model.get('weights_sha256', ''))[:8]}"


def result_table(run: dict[str, Any]) -> str:
    """HTML: every metric of a result, how it was measured, and what is to be known about it."""
    if not run.get("result"):
        return f"<p>This run is {html.escape(run['state'])} and has no result.</p>"
    result = run["result"]
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{figure(metric)}</td><td>{metric.get('n', '')}</td></tr>"
        for name, metric in result["metrics"].items()
    )
    notes = "".join(f"<li>{html.escape(str(note))}</li>" for note in result.get("notes", []))
    return (
        f"<table><caption>{html.escape(run['evaluator'])} on {html.escape(run['data'])}</caption>"
        f"<thead><tr><th>metric</th><th>value (95 %)</th><th>n</th></tr></thead><tbody>{rows}</tbody></table>"
        f"<p>{html.escape(str(result.get('protocol', '')))}</p><ul>{notes}</ul>"
    )


def evaluate_tab(parts: Parts) -> None:
    """What can be started, what runs, what came out."""
    with parts.tab("Evaluate", "evaluate", image=False):
        gr.Markdown(
            "Measure the network that this server runs, on data that its operator allows. One evaluation runs at a time."
        )
        if parts.served.rest is None:
            gr.Markdown(
                "Evaluations need the server's REST address: start the demo with `--server http://host:port`.",
                elem_classes="hint",
            )
            return
        tab = EvaluateTab(parts.served)
        with gr.Row():
            evaluator = gr.Dropdown([], label="Evaluator", elem_id="evaluator")
            data = gr.Dropdown([], label="Data", elem_id="evaluation-data")
        with gr.Row():
            start = gr.Button("Start", variant="primary", elem_id="evaluation-start")
            cancel = gr.Button("Cancel", elem_id="evaluation-cancel")
        missing = gr.Markdown(elem_id="evaluation-words")
        now = gr.HTML(elem_id="evaluation-state")
        table = gr.HTML(elem_id="leaderboard", label="Leaderboard", container=False)
        chosen = gr.Dropdown([], label="Report of", visible=False, elem_id="report-of")
        report = gr.HTML(elem_id="report")
        seen, started = gr.State(""), gr.State("")

        def in_front(work: Any) -> Any:
            return lambda looked_at, *values: work(*values) if looked_at == "evaluate" else gr.skip()

        quiet: dict[str, Any] = {"show_progress": "hidden"}
        back = [parts.looked_at.change, parts.back.change]
        gr.on(back, in_front(tab.choices), parts.looked_at, [evaluator, data, missing], **quiet)
        ticks = [*back, started.change, gr.Timer(EVERY_S).tick]
        gr.on(ticks, in_front(quietly(tab.watch, 4)), [parts.looked_at, seen], [now, table, chosen, seen], **quiet)
        start.click(tab.start, [evaluator, data], [started, now])
        cancel.click(tab.cancel, None, now)
        chosen.change(tab.report, chosen, report)


def quietly(work: Any, n_outputs: int) -> Any:
    """For a timer: while the server is away, the page's own line says so once; a message every tick would not help."""

    def event(*values: Any) -> Any:
        try:
            return work(*values)
        except gr.Error:
            return (gr.skip(),) * n_outputs if n_outputs > 1 else gr.skip()

    return event
