"""Learning from a teacher while being pruned: a given one, or the model's own earlier self (Eq. 7 of the paper).

L = mu L_distill + (1 - mu) L_task,     L_distill = w_logits T^2 KL(teacher || student) + w_layers sum_i MSE(Tr(H_s^phi(i)), H_t^i)
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapter.layer import APTAdapter
from ..common import own_capture
from ..common.checks import checked_int, checked_mapping, checked_number, checked_seed
from ..distributed.dtensor import is_sharded
from ..model import APTModel, adapters
from ..pruning.architectures.lookup import in_encoder, is_encoder_decoder
from ..pruning.block_masks import host_mask, take_carriers
from ..pruning.float32_heads import Hook
from ..wrapping import cut_states, model_state
from .fingerprints import SharedWeights
from .refusals import generator_state
from .replayed_loss import PRUNED, Buffers, Progress, ReplayedLoss, settings_of, weight_of

logger = logging.getLogger("apt_ext")

_LABELS = ("labels", "start_positions", "end_positions")
_HEADS = ("logits", "start_logits", "end_logits")  # of a model's outputs; question answering has the last two
# A hook belongs to whoever watches that one model, and is not copied; but stock classes collect hidden states through
# hooks of their own, and ours cast.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Distiller:
    """The loss of a training step, with or without a teacher:

        distiller = Distiller(model, teacher="self")
        optimizer = AdamW([*adapter_parameters(model), *distiller.parameters()])
        ...
        outputs = model(**batch, **distiller.asks)
        distiller.loss(batch, outputs, progress).backward()     # progress: distill_weight(step, start, end)

    teacher      None: the task's loss alone. A module with the student's inputs and outputs, put into
                 evaluation mode, of the student's hidden size of now or of that before its cuts. "self": the
                 student as it is now and after each `refresh`: its frozen weights in the same memory, its
                 adapters, trained modules and masks as copies. It computes under its own masks, whatever
                 becomes of the student's; once the student was cut the teacher alone holds the weights of before, of
                 which the logger tells (see `memory`), until the next `refresh`.
    logits, layers  weights of the two terms; 0 leaves a term, and what only it needs, out
    temperature  T; the teacher's and the student's logits are divided by it
    quarters     in so many stretches the layers are divided; of each one layer of the teacher, drawn anew every step, is compared
    rank, scaling  of Tr: student state -> teacher state, x + scaling (x A^T) B^T, the identity at the start. Its Parameters are the same
                 objects for life, through refreshes, growth and cuts.
    seed         of the layers that are drawn: the same on every rank of a process group

    phi(i) is the student's layer i while something is left of each of its blocks; else the nearest such layer below or above, whichever is
    closer to the teacher at that moment; where there is none, layers of which anything is left, and at last layer i itself. Positions that
    are padding count in neither term. Encoder-decoders: states are divided by their root mean square, and the two stacks' losses averaged.

    Raises ValueError and TypeError naming the argument.
    """

    def __init__(
        self,
        model: APTModel,
        teacher: nn.Module | str | None = None,
        *,
        logits: float = 1.0,
        layers: float = 0.9,
        temperature: float = 2.0,
        quarters: int = 4,
        rank: int = 8,
        scaling: float = 2.0,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, APTModel):
            raise TypeError(f"model: expected an APTModel, got {type(model).__name__}")
        if not (teacher is None or teacher == "self" or isinstance(teacher, nn.Module)):
            raise TypeError(f'teacher: expected None, "self" or a module, got {teacher!r}')
        if teacher is model or teacher is model.model:
            raise ValueError('teacher: expected another model than the student, got the student; "self" keeps a copy of it')
        for name, value in (("logits", logits), ("layers", layers), ("temperature", temperature)):
            checked_number(name, value, 0.0)
        if teacher is not None and not (logits or layers):
            raise ValueError("logits, layers: expected a weight above 0 for one of them, got 0 and 0")
        if temperature == 0:
            raise ValueError("temperature must be above 0, got 0")
        checked_int("quarters", quarters, 1)
        checked_int("rank", rank, 1)
        checked_number("scaling", scaling)
        self.model, self.logits, self.layers, self.temperature, self.quarters = model, logits, layers, temperature, quarters
        self.own = teacher == "self"
        self._generator = checked_seed("seed", seed)
        self._lanes = model.hidden_left  # which dimensions of the model as it was built are those of Tr; None: all
        self.teacher: nn.Module | None = None
        self.transform: APTAdapter | None = None
        self._shared = SharedWeights({})  # the frozen weights of an own self, as at the last refresh
        self._told = model.blocks  # the blocks of the student when its teacher's memory was last told of
        self._buffers = Buffers()
        self._places: dict[str, tuple[Tensor, Tensor]] = {}  # positions on the host, and on the device
        if teacher is None:
            return
        width = _width("model", model) if layers else 0
        if isinstance(teacher, nn.Module):
            if layers and (found := _width("teacher", teacher)) != width:
                width = self._width_before_cuts(found, width)
            self.teacher = teacher.eval()
        if layers:
            first = next(model.parameters())
            self.transform = APTAdapter(
                width, width, rank, scaling, device=first.device, dtype=torch.promote_types(first.dtype, torch.float32)
            )
        if self.own:
            self.refresh()

    def _width_before_cuts(self, teachers: int, students: int) -> int:
        """Return the teacher's hidden size; ValueError if the student cannot have had it before its cuts."""
        if self._lanes is None or teachers != self.model.blocks.full["hidden"]:
            raise ValueError(f"teacher: expected the student's hidden size {students}, got {teachers}; layers=0 compares logits alone")
        self._lanes = None
        return teachers

    @property
    def memory(self) -> int:
        """Bytes that an own self holds alone: copies of what trains, and the weights that a cut has left to it."""
        if not self.own or self.teacher is None:
            return 0
        students = {_storage(tensor).data_ptr() for tensor in _tensors(self.model)}
        held = {_storage(tensor).data_ptr(): _storage(tensor).nbytes() for tensor in _tensors(self.teacher)}
        return sum(size for address, size in held.items() if address not in students)

    def _tell_of_memory(self) -> None:
        """Say, once after each cut of the student, what the teacher holds alone."""
        if self.model.blocks is self._told:
            return
        self._told = self.model.blocks
        logger.info(
            "Distiller: the student was cut, and its own self, the teacher, keeps the weights of before: %.1f MiB that it holds alone; "
            "refresh() makes the student as it is now the teacher",
            self.memory / 2**20,
        )

    @property
    def asks(self) -> dict[str, Any]:
        """Further arguments of the student's forward pass."""
        return {"output_hidden_states": True} if self.transform is not None else {}

    def parameters(self) -> list[nn.Parameter]:
        """Those of Tr, for the optimizer."""
        return [] if self.transform is None else [self.transform.lora_A, self.transform.lora_B]

    def refresh(self) -> None:
        """The student as it is now becomes the teacher. RuntimeError where the teacher is a given one, or an adapter is merged."""
        if not self.own:
            raise RuntimeError('refresh: expected a Distiller made with teacher="self", got another')
        self._refuse_merged("refresh")
        self.teacher = frozen_copy(self.model)
        frozen = {name: value for name, value in self.model.named_parameters() if not value.requires_grad}
        self._shared, self._told = SharedWeights(frozen), self.model.blocks

    def loss(self, batch: Mapping[str, Any], outputs: Any, progress: Progress = 1.0) -> Tensor:
        """The loss of one pass, a scalar.

        batch     what the student was called with, by keyword; the teacher is called with the same, without gradients
        outputs   the student's, with `loss` and the logits, and hidden states where `asks` wants them
        progress  mu, taken into [0, 1]: at 0 the teacher is not run, at 1 the task's own loss is not used. Or a function without arguments
                  that gives it, such as `lambda: controller.progress`: a GraphedStep can then capture the loss, asks it before each replay
                  (maybe more than once), and captures anew where mu leaves 0 or reaches 1, after `refresh` and with the student's changes.

        Call it under the same autocast as the student's pass. ValueError for what the outputs lack or what has another shape than the
        teacher's; RuntimeError while an adapter is merged into weights that the teacher shares, and after
        merge_and_unload() of the student or anything else that wrote into them. Within a capture RuntimeError for a plain number, and for
        a student with a layer of which a block is pruned whole: GraphedStep then runs eagerly.
        """
        checked_mapping("batch", batch)
        mu = weight_of(progress)
        graph = None if self.teacher is None else self._graph(progress, mu)
        if self.teacher is None or mu == 0.0:
            task: Tensor = _wanted(outputs, "loss")
            return task
        if self.own:
            self._refuse_merged("loss")
            self._refuse_written()
            self._tell_of_memory()
        shared = {key: value for key, value in batch.items() if key not in _LABELS or (key == "labels" and is_encoder_decoder(self.model))}
        with torch.no_grad():
            taught = self.teacher(**shared, **self.asks)
        total: Tensor | float = 0.0
        if self.logits:
            total = total + self.logits * self._logit_loss(batch, outputs, taught)
        if self.layers:
            total = total + self.layers * self._layer_loss(batch, outputs, taught, graph)
        assert isinstance(total, Tensor)
        if mu == 1.0:
            return total
        task = _wanted(outputs, "loss")
        return mu * total + (1.0 - mu) * task if graph is None else graph.mixed(total, task)

    # -- in a graph ----------------------------------------------------------------------------------------------------

    def _graph(self, progress: Progress, mu: float) -> ReplayedLoss | None:
        """Say when a graph of this loss is outdated; within a capture, return what it reads of the host."""
        weights = self._buffers.get("weights", 2, torch.float64, next(self.model.parameters()).device)
        graph = ReplayedLoss(progress, weights, self._drawn) if own_capture.is_recording() else None
        if graph is not None and mu == 1.0 and not self.logits:
            raise RuntimeError("loss: with logits=0 and progress 1 only the drawn layers learn, which are others in each replay of a graph")
        known = settings_of(self)

        def check() -> str | None:
            now = weight_of(progress)
            if (now > 0.0, now < 1.0) != (mu > 0.0, mu < 1.0):
                return "the weight of the teacher has left 0, or reached 1"
            if settings_of(self) != known:
                return "the Distiller has another teacher or other settings"
            if mu and self.own:
                self._refuse_written()
            stacks = [] if graph is None else graph.stacks
            return None if all(all(self._alive(encoder, count)) for encoder, count in stacks) else PRUNED

        reads = [module for module in (self.teacher, self.transform) if mu and module is not None]
        if graph is not None:
            own_capture.before_each_replay(graph.write, check=check, reads=reads)
        elif callable(progress):
            own_capture.before_each_replay(check=check, reads=reads)
        return graph

    # -- logits --------------------------------------------------------------------------------------------------------

    def _logit_loss(self, batch: Mapping[str, Any], outputs: Any, taught: Any) -> Tensor:
        """T^2 KL(teacher || student): the mean over examples, or over tokens; of question answering, over start and end."""
        terms = []
        for name in _HEADS:
            theirs = getattr(taught, name, None)
            if theirs is None:
                continue
            ours = _wanted(outputs, name)
            if ours.shape != theirs.shape:
                raise ValueError(f"outputs: expected {name} of the teacher's shape {list(theirs.shape)}, got {list(ours.shape)}")
            exact = torch.promote_types(ours.dtype, torch.float32)
            student = F.log_softmax(ours.to(exact) / self.temperature, -1)
            target = F.log_softmax(theirs.to(exact) / self.temperature, -1)
            each = F.kl_div(student, target, reduction="none", log_target=True).sum(-1)
            counted = _counted(batch, self.model, "logits") if each.dim() == 2 else None
            terms.append(_mean(each, counted) * self.temperature**2)
        if not terms:
            raise ValueError(f"teacher: expected outputs with {', '.join(_HEADS)}, got {type(taught).__name__}; logits=0 leaves them out")
        return torch.stack(terms).mean()

    # -- layers --------------------------------------------------------------------------------------------------------

    def _layer_loss(self, batch: Mapping[str, Any], outputs: Any, taught: Any, graph: ReplayedLoss | None) -> Tensor:
        two = is_encoder_decoder(self.model)
        stacks = {"encoder.": "encoder_hidden_states", "decoder.": "decoder_hidden_states"} if two else {"": "hidden_states"}
        terms = []
        for prefix, name in stacks.items():
            ours, theirs = _wanted(outputs, name), _wanted(taught, name)
            if len(ours) != len(theirs):
                raise ValueError(f"teacher: expected the student's {len(ours) - 1} layers, got {len(theirs) - 1}; layers=0 leaves them out")
            counted = _counted(batch, self.model, name)
            encoder, ours, theirs = two and prefix == "encoder.", ours[1:], theirs[1:]  # without the embeddings
            drawn = self._buffers.get(name, min(self.quarters, len(ours)), torch.int64, ours[0].device)
            alive = self._alive(encoder, len(ours))
            pairs: Iterable[tuple[Sequence[Tensor], Tensor]]
            if graph is None:
                layers = self._drawn(len(ours))
                pairs = [([ours[i] for i in nearest_layers(layer, alive)], theirs[layer]) for layer in layers]
            elif all(alive):
                pairs = graph.drawn(encoder, ours, theirs, drawn)
            else:
                raise RuntimeError(PRUNED)
            term: Tensor | float = 0.0
            for near, target in pairs:
                term = term + torch.stack([self._distance(one, target, counted, two) for one in near]).min()
            terms.append(term)
        return torch.stack([term for term in terms if isinstance(term, Tensor)]).mean()

    def _drawn(self, count: int) -> list[int]:
        """One layer of each stretch."""
        stretches = min(self.quarters, count)
        bounds = [count * i // stretches for i in range(stretches + 1)]
        pairs, generator = zip(bounds[:-1], bounds[1:], strict=True), self._generator
        return [int(torch.randint(low, high, (), generator=generator, device="cpu")) for low, high in pairs]

    def _alive(self, encoder: bool, count: int) -> list[bool]:
        """Of each layer of the encoder, or of the other stack, whether something is left of each of its blocks.

        Waits for the device only where somebody else has written masks there.
        """
        blocks, two = self.model.blocks, is_encoder_decoder(self.model)
        model = self.model.model
        own = {name: block.layer for name, block in blocks.items() if not two or in_encoder(model, block) == encoder}
        names: list[list[str]] = [[] for _ in range(count)]
        for name, layer in own.items():
            if 0 <= layer < count:  # hidden dimensions are of none
                names[layer].append(name)
        left = {name: bool((host_mask(model, blocks[name]) != 0).any()) for layer in names for name in layer}
        whole = [all(left[name] for name in layer) for layer in names]
        return whole if any(whole) else [any(left[name] for name in layer) for layer in names]

    def _distance(self, ours: Tensor, theirs: Tensor, counted: Tensor | None, normed: bool) -> Tensor:
        """The mean square of Tr(ours) - theirs over the elements of the positions that count."""
        assert self.transform is not None
        state = _scattered(ours, self._positions("student", self.model, ours.device), self.transform.in_features)
        state = state + self.transform(state)
        lanes = self._positions("teacher", self.teacher, ours.device)
        if lanes is not None:
            state = state.index_select(-1, lanes)
        if state.shape != theirs.shape:
            raise ValueError(f"outputs: expected hidden states of the teacher's shape {list(theirs.shape)}, got {list(state.shape)}")
        exact = torch.promote_types(torch.promote_types(state.dtype, theirs.dtype), torch.float32)
        state, target = state.to(exact), theirs.to(exact)
        if normed:
            state, target = _by_root_mean_square(state), _by_root_mean_square(target)
        return _mean((state - target).square().mean(-1), counted)

    def _positions(self, name: str, model: nn.Module | None, device: torch.device) -> Tensor | None:
        """Where the hidden dimensions that are left of a student or of its own self lie among those of Tr; None: all, in order."""
        left = model.hidden_left if isinstance(model, APTModel) and (self.own or model is self.model) else None
        if left is None:
            return None
        left = left if self._lanes is None else torch.searchsorted(self._lanes, left)
        placed = self._places.get(name)
        if placed is None or placed[1].device != device or not torch.equal(placed[0], left):
            placed = self._places[name] = left, left.to(device)  # once: a graph copies nothing from the host
        return placed[1]

    def _refuse_merged(self, call: str) -> None:
        merged = next((name for name, adapter in adapters(self.model) if adapter.merged), None)
        if merged is not None:
            raise RuntimeError(f"{call}: {merged} is merged into a weight that the teacher shares; unmerge it first")

    def _refuse_written(self) -> None:
        written = self._shared.written()
        if written is not None:
            raise RuntimeError(
                f"loss: {written} was written since the last refresh, by merge_and_unload() of the student "
                "or by others, and the teacher shares its memory, so it is not the model any more that it "
                "was; call refresh() for the student as it is now, or make a new Distiller with a copy of "
                "the model as its teacher"
            )

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tr, the generator, and of an own self the adapters, trained modules and masks; a given teacher is not in it."""
        transform = (
            {} if self.transform is None else {f"transform.{key}": value.clone() for key, value in self.transform.state_dict().items()}
        )
        own = self.teacher.own_state() if self.own and isinstance(self.teacher, APTModel) else {}
        teacher = {f"teacher.{key}": value.clone() for key, value in own.items()}
        return {**transform, **teacher, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Into a Distiller made alike, of a model of the sizes that it had at the last refresh, or not cut as far: an own self is cut
        alike. ValueError for other keys or sizes. Nothing has then changed.
        """
        got = dict(checked_mapping("state", state))
        if not (self.own and isinstance(self.teacher, APTModel)):
            self._load(got)
            return
        teacher, before = self.teacher, self.teacher.blocks
        left = cut_states.read(got, before, "teacher.")
        if left is None:
            cut_states.refuse_less_cut(got, before, "teacher.")
        placed: dict[str, nn.Module] = {}
        streams = model_state.holds_stream_masks(got, before, "teacher.")
        if streams:  # a refresh was after hidden dimensions could be masked; here none has been yet
            placed = model_state.place_stream_carriers(teacher.model, before)
        try:
            with cut_states.cut_to(teacher.model, before, left) as blocks:
                teacher.blocks = blocks
                self._load(got if streams else {**model_state.own_carriers(teacher.model, "teacher."), **got})
        except BaseException:
            teacher.blocks = before
            take_carriers(teacher.model, placed)
            raise
        if self.teacher.blocks is not before:
            self._shared = SharedWeights({})  # it shares no memory with the student any more

    def _load(self, got: dict[str, Any]) -> None:
        expected = self.state_dict()
        if expected.keys() != got.keys():
            odd = sorted(expected.keys() ^ got.keys())
            raise ValueError(f"state: expected the keys of a Distiller made alike, got others: {', '.join(odd[:4])}")
        generator_state("state['generator']", got["generator"])
        for key, value in got.items():
            mine = expected[key]
            if isinstance(mine, Tensor) and not isinstance(value, Tensor):
                raise TypeError(f"state[{key!r}]: expected a tensor, got {type(value).__name__}")
            if not key.rpartition(".")[2].startswith("lora") and isinstance(mine, Tensor) and value.shape != mine.shape:
                raise ValueError(f"state: expected {key} of shape {list(mine.shape)}, got {list(value.shape)}")

        def part(prefix: str) -> dict[str, Any]:
            return {key.removeprefix(prefix): value for key, value in got.items() if key.startswith(prefix)}

        if self.transform is not None:
            self.transform.load_state_dict(part("transform."))
        if self.own and isinstance(self.teacher, APTModel):
            self.teacher.load_own_state(part("teacher."))
        self._generator.set_state(got["generator"].cpu())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if is_sharded(tensor) else tensor).untyped_storage()  # type: ignore[attr-defined]


def frozen_copy(model: APTModel) -> APTModel:
    """A copy in evaluation mode: frozen Parameters lie in the same memory, all else is its own; no gradients, no hooks but the stock ones.

    A Parameter of `model` that changes size later (growth, cut) takes new memory, so the copy stays what it is; a merge reaches it. Where
    `compact` has offloaded weights, the copy is compacted alike and reads the same host memory.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        value = parameter.detach()
        memo[id(parameter)] = nn.Parameter(value.clone() if parameter.requires_grad else value, requires_grad=False)
    for stored in (adapter.packing.store.host for _, adapter in adapters(model)):
        if stored is not None:
            memo[id(stored)] = stored
    for module in model.modules():
        for hooks in (getattr(module, name) for name in _HOOKS):
            own = {key: hook for key, hook in hooks.items() if isinstance(hook, Hook) or _is_stock(hook)}
            memo[id(hooks)] = OrderedDict(own)
    return copy.deepcopy(model, memo).eval()


def _is_stock(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("transformers.")


def nearest_layers(layer: int, alive: list[bool]) -> list[int]:
    """phi's candidates: `layer` itself if it is alive, else the nearest alive one below and above; `layer` where none is."""
    if alive[layer] or not any(alive):
        return [layer]
    below = [i for i in range(layer) if alive[i]][-1:]
    return below + [i for i in range(layer + 1, len(alive)) if alive[i]][:1]


def _wanted(outputs: Any, name: str) -> Any:
    found = getattr(outputs, name, None)
    if found is None:
        raise ValueError(f"outputs: expected {name}, got none; call the student with labels and with **distiller.asks")
    return found


def _width(name: str, model: nn.Module) -> int:
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(f"{name}: expected a config with hidden_size, got {type(model).__name__}; layers=0 compares logits alone")
    return width


def _scattered(states: Tensor, positions: Tensor | None, width: int) -> Tensor:
    """states [..., left] in a tensor [..., width], zero where the student has no dimension left."""
    if positions is None:
        return states
    return states.new_zeros(*states.shape[:-1], width).index_copy(-1, positions, states)


def _by_root_mean_square(states: Tensor) -> Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)


def _counted(batch: Mapping[str, Any], model: nn.Module, of: str) -> Tensor | None:
    """[batch, length] bool: the positions that are no padding; None: all. Logits of a language model count where labels are not -100."""
    labels = batch.get("labels")
    if of == "logits" and isinstance(labels, Tensor) and labels.dim() == 2:
        return labels != -100
    inner = of == "decoder_hidden_states" or (of == "logits" and is_encoder_decoder(model))
    mask = batch.get("decoder_attention_mask" if inner else "attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of values [...] over the positions that count; padding is selected away, NaN included."""
    if counted is None or counted.shape != values.shape:
        return values.mean()
    return values.masked_fill(counted.logical_not(), 0.0).sum() / counted.sum().clamp(min=1)  # `where` would copy its 0 to the device
