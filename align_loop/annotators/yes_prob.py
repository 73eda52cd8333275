"""The probability of "yes" to questions about one answer.

Source: implicit preference optimization ("your language model is secretly a preference classifier"): the score of an
answer is the probability that the model says yes when it is asked whether the answer is good, in the words of a
category. The questions below are this package's own; several are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from align_loop.annotators.job import Annotation, Job
from align_loop.annotators.judge_logit import softmax_first
from align_loop.annotators.judging import (
    TOO_LONG,
    Reader,
    by_prompt,
    check_template,
    conversation,
    fill,
    messages_of,
    score_row,
)
from align_loop.errors import UserError

QUESTIONS = {
    "helpful": "Instruction:\n{prompt}\n\nAnswer:\n{answer}\n\n"
    "Does this answer do everything that the instruction asks for? Reply with Yes or No alone.",
    "correct": "Instruction:\n{prompt}\n\nAnswer:\n{answer}\n\n"
    "Is everything in this answer correct and free of harm? Reply with Yes or No alone.",
}


@dataclass
class YesProb:
    """Reward = mean over ``questions`` of p(yes) / (p(yes) + p(no)), in [0, 1].

    ``judge``: policy, another role, or a model folder. ``questions``: name -> user message with {prompt} and {answer}
    (null: this package's own two). ``yes_word``, ``no_word``: words of one token. The mean of each question is a fact
    of the stage. An answer for which a question does not fit in the judge is not scored.
    """

    judge: str = "policy"
    questions: dict[str, str] | None = None
    yes_word: str = "Yes"  # not "yes", which YAML reads as true
    no_word: str = "No"

    def __post_init__(self) -> None:
        if self.questions is not None and not self.questions:
            raise ValueError("annotator.questions is empty: give at least one, or null for the package's own")
        for name, text in (self.questions or {}).items():
            check_template(f"annotator.questions.{name}", text, ("prompt", "answer"))
        if self.yes_word == self.no_word:
            raise ValueError(f"annotator.yes_word={self.yes_word} must differ from annotator.no_word")

    def roles(self) -> dict[str, str]:
        """The model that it reads."""
        return {"judge": self.judge}

    def annotate(self, job: Job) -> Annotation:
        """The reward of each answer."""
        answers = [row for rows in by_prompt(job).values() for row in rows]
        messages, questions = messages_of(job), self.questions or QUESTIONS
        reader = Reader(job.models["judge"], job.dtype, job.context)
        words = {"annotator.yes_word": self.yes_word, "annotator.no_word": self.no_word}
        tokens = [reader.renderer.single_token(word, key) for key, word in words.items()]
        if tokens[0] == tokens[1]:
            raise UserError(f"annotator.yes_word={self.yes_word}: the same token as annotator.no_word; choose others")
        prompts: dict[str, list[list[int]]] = {}
        for row in answers:
            question = conversation(messages[row["prompt_id"]])
            texts = [fill(text, prompt=question, answer=row["text"]) for text in questions.values()]
            ids = [reader.renderer.prompt_ids([{"role": "user", "content": text}]) for text in texts]
            if all(reader.fits(len(one) + 1) for one in ids):
                prompts[row["sample_id"]] = ids
        dropped = {TOO_LONG: len(answers) - len(prompts)}
        job.context.rows("judged answers", into=len(answers), out=len(prompts), dropped=dropped)
        flat = [ids for asked in prompts.values() for ids in asked]
        with job.context.progress(len(flat), "questions") as progress:
            yes = [softmax_first(row) for row in reader.next_logprobs(flat, tokens, progress.update)]
        number = len(questions)
        if yes:
            job.context.fact("mean yes", {name: fmean(yes[i::number]) for i, name in enumerate(questions)})
        kept = [row for row in answers if row["sample_id"] in prompts]
        rewards = [fmean(yes[number * i : number * (i + 1)]) for i in range(len(kept))]
        return Annotation([score_row(row, reward) for row, reward in zip(kept, rewards, strict=True)])
