"""REST for evaluations: start, watch, list, read, cancel."""

import asyncio
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from starlette.responses import FileResponse, HTMLResponse, JSONResponse

from server.evaluation_options import check_options
from server.evaluations import Evaluation, Evaluations, EvaluatorName
from server.http_body import whole
from server.openapi import PROBLEMS, EvaluationList, answers

PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
}
"""A report is text, pictures and style; nothing in it may run or fetch."""


class Start(BaseModel):
    """What to evaluate."""

    evaluator: EvaluatorName
    data: str
    """A name that the operator gave with --evaluation-data."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the evaluator's protocol, by the names of its command's flags with underscores; left out: its own."""


def make_evaluation_routes(evaluations: Evaluations) -> APIRouter:
    """All routes below /v1/evaluations."""
    router = APIRouter(prefix="/v1/evaluations", tags=["evaluations"], responses=PROBLEMS)

    @router.post(
        "",
        responses=answers(Evaluation, 202),
        summary="Evaluate the served network; poll the answer's id",
        status_code=202,
    )
    async def start(wanted: Start) -> JSONResponse:
        await asyncio.to_thread(check_options, wanted.evaluator, wanted.options)
        run = evaluations.start(wanted.evaluator, wanted.data, wanted.options)
        return JSONResponse(run.to_json(full=False), 202, {"location": f"/v1/evaluations/{run.id}"})

    @router.get(
        "",
        responses=answers(EvaluationList),
        summary="All evaluations, newest first; the evaluators and the data there are",
    )
    async def listing() -> JSONResponse:
        runs = [run.to_json(full=False) for run in evaluations.runs()]
        choices = {"evaluators": evaluations.evaluators(), "data": evaluations.data_names}
        return JSONResponse({"evaluations": runs, **choices})

    @router.get("/{run_id}", responses=answers(Evaluation), summary="State, progress and, in the end, the result")
    async def watch(run_id: str) -> JSONResponse:
        return JSONResponse(evaluations.get(run_id).to_json(full=True))

    @router.get("/{run_id}/report", summary="Page of an evaluation that is done", response_class=HTMLResponse)
    async def report(run_id: str) -> FileResponse:
        return FileResponse(evaluations.report(run_id), media_type="text/html", headers=PAGE_HEADERS)

    @router.delete(
        "/{run_id}",
        responses=answers(Evaluation, 202),
        summary="Cancel a running evaluation",
        status_code=202,
        dependencies=[Depends(whole)],
    )
    async def cancel(run_id: str) -> JSONResponse:
        return JSONResponse(evaluations.cancel(run_id).to_json(full=False), 202)

    return router
