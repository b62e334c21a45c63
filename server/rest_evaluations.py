"""REST for evaluations: start, watch, list, cancel."""

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import JSONResponse

from server.evaluations import Evaluations, EvaluatorName
from server.rest import PROBLEMS


class Start(BaseModel):
    """What to evaluate."""

    evaluator: EvaluatorName
    data: str
    """A name that the operator gave with --evaluation-data."""


def make_evaluation_routes(evaluations: Evaluations) -> APIRouter:
    """All routes below /v1/evaluations."""
    router = APIRouter(prefix="/v1/evaluations", tags=["evaluations"], responses=PROBLEMS)

    @router.post("", summary="Evaluate the served network; poll the answer's id", status_code=202)
    async def start(wanted: Start) -> JSONResponse:
        run = evaluations.start(wanted.evaluator, wanted.data)
        return JSONResponse(run.to_json(full=False), 202, {"location": f"/v1/evaluations/{run.id}"})

    @router.get("", summary="All evaluations, newest first, and the data there is")
    async def listing() -> JSONResponse:
        runs = [run.to_json(full=False) for run in evaluations.runs()]
        return JSONResponse({"evaluations": runs, "data": evaluations.data_names})

    @router.get("/{run_id}", summary="State, progress and, in the end, the result")
    async def watch(run_id: str) -> JSONResponse:
        return JSONResponse(evaluations.get(run_id).to_json(full=True))

    @router.delete("/{run_id}", summary="Cancel a running evaluation", status_code=202)
    async def cancel(run_id: str) -> JSONResponse:
        return JSONResponse(evaluations.cancel(run_id).to_json(full=False), 202)

    return router
