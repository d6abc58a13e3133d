"""What a row of the table of architectures is made of, and the blocks that a row finds in a model. Imports only torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """One side of a module on which a block's mask acts.

    module  its name: within the layer in the table (where it may be missing), within the model in a Block
    side    "in" (columns of the weight) or "out" (its rows, and the bias)
    scales  a fractional value of the mask acts on this side; every other side of the block gets the exact zeros alone
    part    which of `parts` equal, adjacent stretches of the side it is, where one linear holds several (GPT-2's query, key and value)
    acts    whether the mask acts there; a side where it does not is only cut (a table of position biases, one column a head)
    of      "linear", "embedding" or "norm"; filled in for a Block
    role    what the linear is to the block: "q", "k", "v" or "o" of heads, "up" or "down" of neurons, else "". Where
            a rule gives none it is filled in for a Block: the output that scales is V, the other outputs are Q and K in
            this order, the input is O; of neurons outputs are "up" and the input is "down"
    """

    module: str
    side: str
    scales: bool = False
    part: int = 0
    parts: int = 1
    acts: bool = True
    of: str = "linear"
    role: str = ""


@dataclass(frozen=True)
class BlockRule:
    """How one kind of block looks in each layer.

    kind         "heads" or "neurons"
    width_field  the entry of the model's config that says how many there are
    sides        where its mask acts; those that the model lacks are passed over, the one that scales must be there
    name         the last part of the block's name, None: the kind; "cross_heads": attention of a decoder to its encoder
    owner        the module that holds the attributes below, within the layer
    size         its attribute that says how many adjacent channels one of the block is (a head's size); "" for one
    size_field   the entry of the config that says it, where the config has one; where layers agree it is set
    groups_field  the entry of the config that says how many KV heads there are, where query heads may share them
    counts       its attributes that a cut sets to the number of query heads
    totals       and to that number times the size
    """

    kind: str
    width_field: str
    sides: tuple[Side, ...]
    name: str | None = None
    owner: str = ""
    size: str = ""
    size_field: str = "head_dim"
    groups_field: str = "num_key_value_heads"
    counts: tuple[str, ...] = ()
    totals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layers:
    """Layers of one kind.

    pattern  matches the end of a layer's name; its group is the number
    blocks   the rules of the blocks in each of them
    prefix   begins the names of their blocks. Without one names begin with the number; where such layers lie in several
             stacks of one model, what tells the paths of the stacks apart is their prefix: "encoder.0.heads"
    """

    pattern: str
    blocks: tuple[BlockRule, ...]
    prefix: str = ""


@dataclass(frozen=True)
class Stream:
    """The residual stream: regular expressions for the ends of the names of every module with Parameters of its own.

    adds         modules whose output is added to the stream: there a fractional value acts
    reads        linears that read it
    norms        norms over it, whose statistics are those of the kept dimensions
    keeps        linears outside it that stock configs tie to its width on both sides, such as a pooler
    apart        modules that do not touch it
    last_norm    the norm whose output a tied output layer reads: it takes back what scales the embedding
    norm_offset  a norm multiplies by norm_offset + weight
    width_field  the entry of the config that says how many dimensions it has
    """

    adds: str
    reads: str
    norms: str
    keeps: str = ""
    apart: str = ""
    last_norm: str = ""
    norm_offset: float = 0.0
    width_field: str = "hidden_size"


@dataclass(frozen=True)
class Architecture:
    """One row of the table: the values of `config.model_type` that it is for, the layers, and the residual stream (None: never cut).

    decoder      whether stock classes read the length of a cache from layer 0, which then has to keep a head: always, never, or None as
                 `config.is_decoder` says
    never_empty  whether stock modules cannot run with nothing left of a block
    derives_head_size  whether the stock config can only say heads of hidden_size / heads channels
    alike        whether the layers of a stack must keep the same heads (T5 shares one position bias)
    heads_divide whether the stock config refuses a number of heads that does not divide hidden_size
    retype       (model_type, entries of the config that must be false) of a class that computes the same and says more; None: there is none
    """

    model_types: tuple[str, ...]
    layers: tuple[Layers, ...]
    stream: Stream | None = None
    decoder: bool | None = False
    never_empty: bool = False
    derives_head_size: bool = False
    alike: bool = False
    heads_divide: bool = False
    retype: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Block:
    """One block of one model.

    kind         "heads" (KV groups where query heads share keys), "neurons" or "hidden"
    count        how many there are: the length of the block's mask
    sides        where the mask acts, with the modules' names in the model
    width_field  the entry of the model's config that says `count`, one for all layers
    size         how many adjacent channels one of them is where it scales: a head's size, else 1
    owner        the module that the rule's attributes belong to; "" for none
    rule         the table's rule; None for "hidden"
    stack        the beginning of the names of all blocks of its stack of layers: the prefix of the row's Layers, or what
                 tells the stacks of the model apart; "" where there is one stack
    layer        the number of its layer; -1 for "hidden"
    part         which of its layer's blocks it is: the rule's name or kind
    """

    kind: str
    count: int
    sides: tuple[Side, ...]
    width_field: str
    size: int = 1
    owner: str = ""
    rule: BlockRule | None = None
    stack: str = ""
    layer: int = -1
    part: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the linears that the block touches, as before wrapping."""
        return tuple(dict.fromkeys(side.module for side in self.sides if side.of == "linear"))

    @property
    def scaling_side(self) -> Side:
        """A side that carries the whole mask, fractions included."""
        return next(side for side in self.sides if side.scales)

    @property
    def reader(self) -> str:
        """The linear that reads the channels of heads or neurons: its input is what the block hands on."""
        return next(side.module for side in self.sides if side.side == "in")

    @property
    def is_cross(self) -> bool:
        """True for attention of a decoder to its encoder."""
        return self.part == "cross_heads"

    def linear(self, *roles: str) -> str:
        """The linear of the first of these roles that the block has; of a block with none of them, the one that scales."""
        found = {side.role: side.module for side in reversed(self.sides) if side.of == "linear"}
        return next((found[role] for role in roles if role in found), self.scaling_side.module)
