"""A request on its way through the scheduler."""

from dataclasses import dataclass

from simple_flashinfer.types import EngineRequest, Int32Array

NO_ROW = -1


@dataclass(slots=True, eq=False)
class Request:
    """Waiting: `token_ids` has its prompt and what it generated before it was preempted, and `row` is NO_ROW.

    Running: its tokens and pages stand in row `row` of the RequestTable, and nowhere else.
    """

    spec: EngineRequest
    token_ids: Int32Array
    row: int = NO_ROW

    @property
    def id(self) -> str:
        return self.spec.request_id

    @property
    def max_total_tokens(self) -> int:
        return len(self.spec.prompt_token_ids) + self.spec.max_tokens
