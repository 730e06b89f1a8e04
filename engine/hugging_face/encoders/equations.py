"""Word problems (ASDiv-A, MAWPS, SVAMP): a small decoder writes a prefix equation from an encoder's states.

The decoder is a Transformer of PyTorch's with attention to the hidden states of the question. Its next symbol is an
operator, a constant of the training equations, or one of the question's numbers, at which it points: operators and
constants have learned vectors, a number has the hidden state of its place, and logits are products with these. In
prefix notation the number of operands that are still to come says where an equation ends, so there is no symbol for it.

Plans follow from the word pieces of the question: numbers, equation and answer reach none.

Letters: B problems, Q ids of the longest question, D width, N numbers of a problem at most, L symbols of the longest
equation, C operators and constants, S = C + N symbols.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreroute.engine.finetune.accuracy import Accuracy, Majority
from foreroute.engine.finetune.equations import MOST_SYMBOLS, OPERATORS, Problem, number_of, read_problems, slot
from foreroute.engine.finetune.held_out import SplitExamples, hold_out_texts
from foreroute.engine.finetune.masking import NOT_ASKED
from foreroute.engine.finetune.sentences import by_length, training_places
from foreroute.engine.finetune.trainee import Evaluation, Trainee
from foreroute.engine.hugging_face.encoders.bert import Pretrained
from foreroute.engine.hugging_face.encoders.models import EVALUATED, Encoder
from foreroute.engine.hugging_face.encoders.tasks import Parts
from foreroute.engine.hugging_face.encoders.texts import TokenBatch, TokenSequence, WordPieces
from foreroute.engine.plug_in import mean_over_ranks

_LAYERS, _HEAD_WIDTH = 2, 64
_OTHER = "other"  # a constant that no training equation has; an equation with it has no value


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A problem as the model reads it."""

    text: TokenSequence
    place_N: tuple[int, ...]  # of the numbers in the ids; 0 where the end of the question was cut off
    problem: Problem

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """The question."""
        return (self.text,)


@dataclass(frozen=True, slots=True)
class EquationBatch:
    """Problems side by side."""

    texts: TokenBatch
    place_BN: Tensor  # int64, of the numbers in the ids
    real_BN: Tensor  # bool: the problem has so many numbers
    symbol_BL: Tensor  # int64, NOT_ASKED after an equation's end

    def __len__(self) -> int:
        """Return the number of problems."""
        return len(self.symbol_BL)


class Symbols:
    """The ids of symbols: operators and constants first, then the numbers of a question.

    Args:
        equations: those to train on, of which the constants are taken.
    """

    def __init__(self, equations: Sequence[Sequence[str]]) -> None:
        constants = sorted({symbol for symbol in chain(*equations) if number_of(symbol) is None} - set(OPERATORS))
        self.fixed = (*OPERATORS, _OTHER, *constants)
        self._ids = {symbol: number for number, symbol in enumerate(self.fixed)}

    def encode(self, equation: Sequence[str]) -> list[int]:
        """Return the ids of an equation."""
        return [self._id(symbol) for symbol in equation]

    def _id(self, symbol: str) -> int:
        number = number_of(symbol)
        return self._ids.get(symbol, self._ids[_OTHER]) if number is None else len(self.fixed) + number

    def decode(self, ids: Sequence[int]) -> list[str]:
        """Return the equation up to its end, or all of it where it has none."""
        found, missing = [], 1
        for number in ids:
            found.append(self.fixed[number] if number < len(self.fixed) else slot(number - len(self.fixed)))
            missing += 1 if number < len(OPERATORS) else -1
            if missing == 0:
                break
        return found


class EquationDecoder(nn.Module):
    """Logits of the symbols of equations.

    Args:
        width: of the encoder's hidden states.
        fixed: operators and constants.
    """

    def __init__(self, width: int, fixed: int, dropout: float) -> None:
        super().__init__()
        heads = 1 if width % _HEAD_WIDTH else width // _HEAD_WIDTH
        layer = nn.TransformerDecoderLayer(
            width, heads, 2 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, _LAYERS, nn.LayerNorm(width))
        self.fixed_CD = nn.Parameter(torch.randn(fixed, width))
        self.start_D = nn.Parameter(torch.randn(width))
        self.number, self.symbol_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.place = nn.Embedding(MOST_SYMBOLS, width)
        self.query = nn.Linear(width, width)

    def symbols(self, hidden_BQD: Tensor, place_BN: Tensor) -> Tensor:
        """Return the vectors of each problem's symbols [B, S, D]."""
        index_BND = place_BN[..., None].expand(-1, -1, hidden_BQD.shape[2])
        number_BND = self.number(hidden_BQD.gather(1, index_BND))
        fixed_BCD = self.fixed_CD.expand(len(hidden_BQD), -1, -1)
        symbol_BSD: Tensor = self.symbol_norm(torch.cat([fixed_BCD, number_BND], dim=1))
        return symbol_BSD

    def forward(self, hidden_BQD: Tensor, batch: EquationBatch, before_BL: Tensor) -> Tensor:
        """Return the logits [B, L + 1, S] after each of the symbols before, and of the first one."""
        symbol_BSD = self.symbols(hidden_BQD, batch.place_BN)
        index_BLD = before_BL[..., None].expand(-1, -1, symbol_BSD.shape[2])
        start_B1D = self.start_D.expand(len(batch), 1, -1)
        x_BLD = torch.cat([start_B1D, symbol_BSD.gather(1, index_BLD)], dim=1)
        length = x_BLD.shape[1]
        x_BLD = x_BLD + self.place.weight[:length]
        later_LL = torch.ones(length, length, dtype=torch.bool, device=x_BLD.device).triu(1)
        x_BLD = self.layers(
            x_BLD, hidden_BQD, tgt_mask=later_LL, memory_key_padding_mask=batch.texts.mask_BQ.to(x_BLD.device) == 0
        )
        logits_BLS = self.query(x_BLD) @ symbol_BSD.mT / x_BLD.shape[2] ** 0.5
        missing_BS = F.pad(~batch.real_BN, (len(self.fixed_CD), 0))
        known_BLS: Tensor = logits_BLS.masked_fill(missing_BS[:, None], float("-inf"))
        return known_BLS


class EquationModel(Trainee):
    """An encoder with a decoder of equations."""

    def __init__(self, encoder: Encoder, words: WordPieces, decoder: EquationDecoder, symbols: Symbols) -> None:
        super().__init__()
        self.encoder, self.words, self.decoder, self.symbols = encoder, words, decoder, symbols

    def hidden(self, batch: EquationBatch, k: int) -> Tensor:
        """Return the hidden states of the questions, fp32."""
        hidden_BQD: Tensor = self.encoder(batch.texts, k)
        return hidden_BQD.float()

    def batches(self, examples: Sequence[WordProblem], batch: int, seed: int) -> Iterator[EquationBatch]:
        """Yield training batches without end."""
        for places in training_places([len(one.text.ids) for one in examples], batch, seed):
            yield self.batch([examples[i] for i in places])

    def batch(self, problems: Sequence[WordProblem]) -> EquationBatch:
        """Return problems side by side, on the model's device but for the questions."""
        equations = [self.symbols.encode(one.problem.equation) for one in problems]
        places = [one.place_N for one in problems]
        place_BN, symbol_BL = _pad(places, NOT_ASKED), _pad(equations, NOT_ASKED)
        device, texts = self.encoder.device, self.words.pad([one.text for one in problems])
        real_BN = place_BN != NOT_ASKED
        return EquationBatch(texts, place_BN.clamp(min=0).to(device), real_BN.to(device), symbol_BL.to(device))

    def loss(self, batch: EquationBatch, k: int, seed: int = 0) -> Tensor:
        """Return the mean cross entropy of the equations' symbols in nats; over all ranks, which may have unequal
        numbers of them."""
        return mean_over_ranks(self._loss(self.hidden(batch, k), batch), int((batch.symbol_BL != NOT_ASKED).sum()))

    def _loss(self, hidden_BQD: Tensor, batch: EquationBatch) -> Tensor:
        """Return the sum over all symbols, each after those before it of the true equation."""
        logits_BLS = self.decoder(hidden_BQD, batch, batch.symbol_BL[:, :-1].clamp(min=0))
        return F.cross_entropy(logits_BLS.flatten(0, 1), batch.symbol_BL.flatten(), reduction="sum")

    def solve(self, hidden_BQD: Tensor, batch: EquationBatch) -> list[list[str]]:
        """Write an equation for each problem: always the likeliest symbol; none is longer than MOST_SYMBOLS."""
        written_BL = batch.place_BN.new_zeros(len(batch), 0)
        missing_B = written_BL.new_ones(len(batch))  # operands that are still to come
        while written_BL.shape[1] < MOST_SYMBOLS and bool((missing_B > 0).any()):
            next_B = self.decoder(hidden_BQD, batch, written_BL)[:, -1].argmax(dim=1)
            missing_B = missing_B + torch.where(next_B < len(OPERATORS), 1, -1)
            written_BL = torch.cat([written_BL, next_B[:, None]], dim=1)
        return [self.symbols.decode(row) for row in written_BL.tolist()]

    @torch.inference_mode()
    def evaluate(self, examples: Sequence[WordProblem], k: int) -> Evaluation:
        """Count the problems that are solved at k active experts; the loss is per symbol of the true equations."""
        was_training, right, count, loss = self.training, 0, 0, 0.0
        self.eval()
        for cut in by_length([len(one.text.ids) for one in examples], range(len(examples)), EVALUATED):
            problems = [examples[i] for i in cut]
            batch = self.batch(problems)
            hidden_BQD = self.hidden(batch, k)
            loss += self._loss(hidden_BQD, batch).item()
            count += int((batch.symbol_BL != NOT_ASKED).sum())
            written = self.solve(hidden_BQD, batch)
            right += sum(one.problem.is_solved_by(equation) for one, equation in zip(problems, written, strict=True))
        self.train(was_training)
        return Evaluation(Accuracy(right, len(examples)), loss / count)


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Put rows side by side, at least one wide."""
    padded = torch.full((len(rows), max(1, *map(len, rows))), value)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded


def problem_parts(train: Path, dev: Path, words: WordPieces, count: int, seed: int) -> Parts:
    """Read files of word problems, and hold `count` problems of train out.

    Raises:
        UserError: a file is not as it must be, or has too few problems.
    """
    found = SplitExamples(*hold_out_texts(read_problems(train), attrgetter("text"), count, seed), read_problems(dev))
    symbols = Symbols([problem.equation for problem in found.train])
    items = found.each(lambda part: _of_problems(part, words))
    return Parts(*items, best_equation(found.dev), partial(_add_decoder, symbols))


def _add_decoder(
    symbols: Symbols, encoder: Encoder, words: WordPieces, found: Pretrained, dropout: float
) -> EquationModel:
    return EquationModel(encoder, words, EquationDecoder(found.width, len(symbols.fixed), dropout), symbols)


def _of_problems(problems: Sequence[Problem], words: WordPieces) -> list[WordProblem]:
    sequences = words.encode([problem.text for problem in problems])
    return [
        WordProblem(one, tuple(_place(problem.text, one, i) for i in range(len(problem.numbers))), problem)
        for problem, one in zip(problems, sequences, strict=True)
    ]


def _place(text: str, sequence: TokenSequence, number: int) -> int:
    """Return the place of the last piece of a number's word; 0 where the question lacks it."""
    found = re.search(rf"\b{slot(number)}\b", text)
    places = [] if found is None else np.flatnonzero(sequence.end == found.end()).tolist()
    return places[0] if places else 0


def best_equation(problems: Sequence[Problem]) -> Majority:
    """Return the equation of a problem that solves most of all problems, and their share."""
    known: dict[tuple[str, ...], int] = {}
    for equation in sorted({problem.equation for problem in problems}):
        known[equation] = sum(problem.is_solved_by(equation) for problem in problems)
    best = max(known, key=lambda equation: known[equation])
    return Majority(" ".join(best), known[best] / len(problems))
