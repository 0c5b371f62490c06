"""The routed model as transformers' own kind of model: `AutoModelForCausalLM.from_pretrained(DIR)` and pipelines."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast

from firstlab.hub.card import published_run, write_card
from firstlab.hub.config import FirstlabConfig
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.output import RouterAugmentedOutput
from firstlab.model.storage import FOLDER_OPTIONS, ModelUnavailableError, load_tokenizer, local_folder, refuse_bad_ends

# What the Auto classes move from the options into the config.
_IN_CONFIG = ("attn_implementation", "experts_implementation")
# What the Auto classes add for other models.
_OF_AUTO = ("_from_auto", "adapter_kwargs", "trust_remote_code", "proxies")


class FirstlabForCausalLM(PreTrainedModel, GenerationMixin):
    """A `RouterAugmentedLM` that transformers' tools take for one of their own.

    Args:
        routed: The model; its base's config and generation config are this model's.
        source: The folder that it was loaded from, where its run's record may be near.

    Attributes:
        skip_rate: What `generate` asks for where its caller names neither routes nor a rate.
    """

    config_class = FirstlabConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, routed: RouterAugmentedLM, source: Path | None = None) -> None:
        if not isinstance(routed, RouterAugmentedLM):
            raise ValueError(
                "firstlab has no models with random weights: use from_pretrained, or FirstlabForCausalLM(routed_model)"
            )
        super().__init__(routed.lm.config)
        self.routed, self.source = routed, source
        self.generation_config = routed.lm.generation_config
        self.skip_rate: float | None = None
        self.train(routed.training)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> FirstlabForCausalLM:
        return cls(config)  # says why not

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, config: Any = None, **kwargs: Any
    ) -> FirstlabForCausalLM:
        """Load a folder or hub id that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            config: Read from the folder; of what the Auto classes give, only the options count that they put there.
            **kwargs: Of transformers' `from_pretrained`, for the base model; `base=` where that has moved.

        Raises:
            ValueError: It is missing, damaged, or not of firstlab.
        """
        if args or kwargs.get("output_loading_info"):
            raise ValueError("output_loading_info and model arguments are for transformers' own models; leave them out")
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_AUTO}
        for name in _IN_CONFIG:
            if (asked := getattr(config, f"_{name}", None)) is not None:
                kwargs.setdefault(name, asked)
        where = {name: kwargs.pop(name) for name in FOLDER_OPTIONS if name in kwargs}
        folder = local_folder(pretrained_model_name_or_path, **where)
        if folder is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} is no folder of firstlab; use RouterAugmentedLM.from_pretrained"
            )
        if (run := published_run(folder)) is not None and run.fixed:
            raise ValueError(
                f"{folder}: its run has fixed routes and no routers; the model alone would run every layer; "
                f'use python -m firstlab.generate run={folder.parent} "text"'
            )
        model = cls(RouterAugmentedLM.from_pretrained(folder, **kwargs), folder)
        if (folder / "generation_config.json").is_file():
            refuse_bad_ends(folder)
            model.generation_config = model.routed.lm.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, push_to_hub: bool = False, save_base: bool = False, **kwargs: Any
    ) -> None:
        """Write routers, the adapter in a folder of its own, generation config, tokenizer with chat template, and card.

        Args:
            save_directory: Folder.
            push_to_hub: Upload it as well; `repo_id` and the other options of `push_to_hub` may follow.
            save_base: Write the base's weights, too; LoRA must be merged.
        """
        folder, name = Path(save_directory), kwargs.pop("repo_id", None)
        self._save(folder, save_base, name)
        if push_to_hub:
            self._upload(folder, name or folder.name, **kwargs)

    def _save(self, folder: Path, save_base: bool, name: str | None) -> None:
        self.routed.save_pretrained(folder, save_base, published=True)
        self.generation_config.save_pretrained(folder)
        with suppress(ModelUnavailableError):  # many models have none
            load_tokenizer(self.source or self.routed.tokenizer_path).save_pretrained(folder)
        write_card(folder, self.routed.num_layers, self.source, name=name)

    def push_to_hub(self, repo_id: str, *, save_base: bool = False, **kwargs: Any) -> str:  # type: ignore[override]
        """Save and upload; returns the commit's address. `private`, `token`, `revision`, `commit_message` may follow.

        Raises:
            ValueError: The base is a folder of this machine and is not saved along.
        """
        base = self.routed.lm.config._name_or_path
        if not save_base and (not base or Path(base).exists()):
            raise ValueError(
                f"the base model is {base!r}, which nobody else can load: call merge_and_unload() and pass "
                "save_base=True, or load the base by its hub id"
            )
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder), save_base, repo_id)
            return self._upload(Path(folder), repo_id, **kwargs)

    def _upload(
        self, folder: Path, repo_id: str, private: bool | None = None, token: str | bool | None = None, **kwargs: Any
    ) -> str:
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        kwargs.setdefault("commit_message", "Upload routers and adapter")
        return str(api.upload_folder(repo_id=repo, folder_path=folder, **kwargs))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> RouterAugmentedOutput:
        """Without labels, what inference does: the first call is prefill, and its cache carries the routes.

        With labels, every layer runs on the tokens before the first label, and the route on the rest.
        """
        if labels is not None:
            if (labels[:, 0] != -100).any():
                raise ValueError("labels begin with the first token, which leaves no prompt to route by: set -100")
            kwargs = {"objective": "decode_consistent", "gate": "hard", **kwargs}
            return self.routed(input_ids, attention_mask, labels, **kwargs)
        cache = self.routed.new_cache() if past_key_values is None else past_key_values
        kwargs.pop("return_dict", None)
        out = self.routed(input_ids, attention_mask, past_key_values=cache, **kwargs)
        if use_cache is False:
            out.past_key_values = None
        return out

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """See `RouterAugmentedLM.generate`, which also takes `routes`, `skip_rate` and `lossless`."""
        ids = kwargs.pop("input_ids", inputs)
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        if self.skip_rate is not None and kwargs.get("routes") is None:
            kwargs.setdefault("skip_rate", self.skip_rate)
        return self.routed.generate(ids, **kwargs)

    def route(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `RouterAugmentedLM.route`."""
        return self.routed.route(*args, **kwargs)

    def merge_and_unload(self) -> FirstlabForCausalLM:
        """Fold LoRA into the base weights; returns self."""
        self.routed.merge_and_unload()
        return self

    def train(self, mode: bool = True) -> FirstlabForCausalLM:
        super().train(mode)
        if hasattr(self, "routed"):
            self.routed.train(mode)
        return self

    def get_input_embeddings(self) -> Any:
        return self.routed.lm.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.routed.lm.get_output_embeddings()


class BaseTokenizer(PreTrainedTokenizerFast):
    """`AutoTokenizer` for folders without a tokenizer of their own, such as those inside a run: that of the base."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        folder = local_folder(path, **{name: kwargs.pop(name) for name in FOLDER_OPTIONS if name in kwargs})
        assert folder is not None  # transformers has read its config.json
        if (folder / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, *args, **kwargs)
        return load_tokenizer(folder)
