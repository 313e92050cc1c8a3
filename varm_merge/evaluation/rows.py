"""The entries that a row of each file must have; other entries are kept and ignored."""

from typing import Any

from pydantic import BaseModel, Field, field_validator


class MTBenchQuestion(BaseModel, strict=True):
    question_id: int | str
    category: str
    turns: list[str] = Field(min_length=1)


class Instruction(BaseModel, strict=True):
    instruction: str
    input: str | None = Field(None, max_length=0)


class Choice(BaseModel, strict=True):
    turns: list[str]


class MTBenchAnswer(BaseModel, strict=True):
    question_id: int | str
    choices: list[Choice] = Field(min_length=1)


class Output(BaseModel, strict=True):
    instruction: str
    output: str
    generator: str


class JudgePrompt(BaseModel, strict=True):
    name: str
    system_prompt: str
    prompt_template: str
    output_format: str


class Judgment(BaseModel, strict=True):
    model: str
    question_id: int | str
    turn: int
    judge: list[str] = Field(min_length=1)
    score: float = Field(allow_inf_nan=False)


class Annotation(BaseModel, strict=True):
    generator_1: str
    generator_2: str
    output_2: str
    annotator: str
    preference: Any

    @field_validator("preference")
    @classmethod
    def is_preference(cls, value: Any) -> Any:
        if value is None or value != value:  # pandas makes NaN of null
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value == 0 or 1 <= value <= 2):
            raise ValueError("it must be from 1 to 2, 0 (a draw), or null")
        return value
