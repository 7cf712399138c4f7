"""What a model is for, which says how it is opened, what it reads and what is measured of it."""

from __future__ import annotations

from enum import StrEnum


class Task(StrEnum):
    """A model's task, by the name of the class of transformers that opens it."""

    CAUSAL_LM = "AutoModelForCausalLM"
    IMAGE_TEXT_TO_TEXT = "AutoModelForImageTextToText"
    SEQ_TO_SEQ_LM = "AutoModelForSeq2SeqLM"
    MASKED_LM = "AutoModelForMaskedLM"
    EMBEDDING = "AutoModel"
    TEXT_ENCODING = "AutoModelForTextEncoding"  # embeddings, of the encoder of a model that has a decoder as well

    @property
    def described(self) -> str:
        """The task in words, such as "masked language model"."""
        return {
            Task.CAUSAL_LM: "causal language model",
            Task.IMAGE_TEXT_TO_TEXT: "image-text-to-text model",
            Task.MASKED_LM: "masked language model",
            Task.SEQ_TO_SEQ_LM: "sequence-to-sequence model",
        }.get(self, "embedding model")

    @property
    def embeds(self) -> bool:
        """Whether the model gives states of its tokens, and no distributions of words."""
        return self in (Task.EMBEDDING, Task.TEXT_ENCODING)

    @property
    def sees_later_tokens(self) -> bool:
        """Whether the blocks that read the text see it whole, so that padding has to be masked."""
        return self not in WRITERS


WRITERS = frozenset({Task.CAUSAL_LM, Task.IMAGE_TEXT_TO_TEXT})  # that write text token by token, and nothing else
ALL_TASKS = frozenset(Task)
NOT_TAKEN = (
    "Classification",
    "QuestionAnswering",
    "MultipleChoice",
    "NextSentencePrediction",
)  # ends of classes' names


def task_of_checkpoint(model_type: str, architectures: object = None) -> Task | None:
    """Tell what a checkpoint is for: by the class that its config names, else by its type.

    Args:
        model_type: as config.json has it.
        architectures: what config.json says of the checkpoint's class.

    Returns:
        The task; None where the library has no class for any of them, or the one that is named is for something else.
    """
    from transformers.models.auto import modeling_auto as auto  # not before something is read

    by_task = {
        Task.CAUSAL_LM: auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        Task.IMAGE_TEXT_TO_TEXT: auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        Task.SEQ_TO_SEQ_LM: auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        Task.MASKED_LM: auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        Task.EMBEDDING: auto.MODEL_MAPPING_NAMES,
        Task.TEXT_ENCODING: auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    }
    known = {task: names[model_type] for task, names in by_task.items() if model_type in names}
    named = architectures if isinstance(architectures, list | tuple) else ()
    for task, names in known.items():
        if not {names, *(names if isinstance(names, tuple) else ())}.isdisjoint(named):
            return task
    if any(name.endswith(NOT_TAKEN) for name in named if isinstance(name, str)):
        return None
    if Task.MASKED_LM in known and any(str(name).endswith("ForPreTraining") for name in named):
        return Task.MASKED_LM
    return next((task for task in known if not task.embeds), None)
