"""One stage of pruning: fresh samples, their gradients, the regression, and the answer written to the network.

    draw -> (noise) -> capture -> (noise) -> defend -> regress -> apply -> (fine-tune) -> recalibrate

What all stages of a run share is a :class:`StageRunner`; the pipeline makes one and runs it stage by stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from swap_prune.checks import first_line
from swap_prune.fisher.backends.mapped import MappedFactor
from swap_prune.fisher.capture.layer_inputs import LayerInputs
from swap_prune.fisher.capture.matrix_free import MatrixFreeFactor
from swap_prune.fisher.capture.rows import Capture
from swap_prune.fisher.factor import DenseFactor, FisherFactor
from swap_prune.fisher.storage import Storage
from swap_prune.losses import (
    GaussNewtonLoss,
    check_calibration,
    check_divergence,
    check_losses,
    run_loss,
)
from swap_prune.network.aliasing import unexpanded
from swap_prune.network.modes import eval_mode
from swap_prune.problem import PruningProblem, PruningSolution, check_solution
from swap_prune.progress import StageProgress
from swap_prune.randomness import forked_generator
from swap_prune.report import StageReport
from swap_prune.request import Request
from swap_prune.sample_defence.record import SampleDefence
from swap_prune.samples.batches import batch_size
from swap_prune.samples.calibration import CalibrationStream
from swap_prune.samples.shares import HELD_OUT
from swap_prune.schedule import Course, keep_count
from swap_prune.selection import unnamed_zeros
from swap_prune.stages.asking import Asking
from swap_prune.stages.capturing import RowCapture, rows_in_batches
from swap_prune.stages.checkpoint import Checkpoint
from swap_prune.stages.defending import Defended, Defender
from swap_prune.stages.findings import StageFindings, check_names
from swap_prune.stages.oddities import few_classes, is_stationary, share_of_largest, without_gradient
from swap_prune.stages.reached import check_reached
from swap_prune.stages.single_rows import SingleRows
from swap_prune.surgery.batchnorm import RECALIBRATION_SAMPLES, recalibrate_batchnorm
from swap_prune.surgery.weights import write_weights
from swap_prune.training.finetune import train
from swap_prune.training.settings import FineTune
from swap_prune.training.teaching import Taught, Teacher

__all__ = ["StageRunner"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class StageRunner:
    """What every stage of a run shares.

    Attributes:
        model: The network.
        request: What is asked for.
        noise_generator: Random state of the noise.
        calibration: Where samples come from.
        recalibration: Where those for BatchNorm's statistics and for fine-tuning come from.
        storage: How G is held. Noise acts on the rows, and a defence cleans them, where that is dense; where no rows
            are held none are looked at.
        teacher: The network before pruning, where the method asks it and the loss can compare outputs.
        trainer: The same, where fine-tuning asks it.
        sample_defence: What has been seen of the samples so far; None where they are believed.
        checkpoint: Keeps finished stages; None: nothing does.
    """

    model: nn.Module
    request: Request
    noise_generator: torch.Generator
    calibration: CalibrationStream
    recalibration: CalibrationStream
    storage: Storage
    teacher: Teacher | None = None
    trainer: Teacher | None = None
    sample_defence: SampleDefence | None = None
    checkpoint: Checkpoint | None = None

    def run_all(self, course: Course, shown: StageProgress) -> list[StageReport]:
        """Run one stage after another, but those that a checkpoint has."""
        sparsities, count = course.sparsities, len(course.sparsities)
        name = f"{count}" if course.schedule == self.request.courses[0].schedule else f"{count}-{course.schedule}"
        shown.expect(count)
        records = [] if self.checkpoint is None else self.checkpoint.resume(name)
        if self.storage.team is not None:
            self.storage.team.agree("finished stages in the checkpoint", str(len(records)))
        for number in range(len(records) + 1, count + 1):
            records.append(self.run(sparsities[number - 1], shown, number, final=number == count))
            if self.checkpoint is not None:
                self.checkpoint.keep(records, name)
        return records

    def run(self, sparsity: float, shown: StageProgress, number: int, *, final: bool) -> StageReport:
        """Capture, solve, apply, fine-tune, recalibrate."""
        started = time.perf_counter()
        request, selection = self.request, self.request.selection
        keep, places = keep_count(selection.total, sparsity), selection.slices()
        floors = [(places[name], least) for name, least in request.floors.items()]
        reference = selection.read(self.model)
        problem = PruningProblem(reference, keep, selection=selection, floors=floors, pattern=request.pattern)
        solution, samples, loss, findings = self._solve(problem, sparsity, shown, number, final=final)
        check_solution(solution, problem, request.solver.name)
        check_names(solution.evidence, request.solver.name)
        write_weights(self.model, selection, solution.weights, solution.kept)
        if request.finetune is not None:
            elsewhere = unnamed_zeros(self.model, selection.names, request.settings["ignore"])  # pruned by another call
            losses = self._finetune(request.finetune, solution.kept, elsewhere, shown, number)
            findings = replace(findings, finetune_loss=losses, zeros_elsewhere=elsewhere or None)
        if request.recalibrates:
            batches = self.recalibration.read(RECALIBRATION_SAMPLES if final else request.samples)
            if not recalibrate_batchnorm(self.model, batches, self._paced(request.loss)):
                findings = replace(findings, not_recalibrated="no batch of the data holds two samples")
        if self.storage.team is not None:  # training may differ in its last bits, on GPUs
            self.storage.team.take_from_first_(map(unexpanded, (*self.model.parameters(), *self.model.buffers())))
        return StageReport(
            sparsity=sparsity,
            kept=keep,
            samples=samples,
            loss=loss,
            seconds=time.perf_counter() - started,
            converged=solution.converged,
            iterations=solution.iterations,
            evidence=findings.to_dict() | dict(solution.evidence),
        )

    def _solve(
        self, problem: PruningProblem, sparsity: float, shown: StageProgress, number: int, *, final: bool
    ) -> tuple[PruningSolution, int, float | None, StageFindings]:
        """Draw samples, capture, and let the method solve; what G takes is free again afterwards.

        Returns:
            The solution, the number of samples, their mean loss where gradients were taken, and what was found.
        """
        solver = self.request.solver
        fitting, spare, findings = self._samples(sparsity, shown, number)
        samples, loss, defence = sum(map(batch_size, fitting)), None, None
        asking: Asking | None = None
        single: SingleRows | None = None
        if solver.needs_gradients:
            if number == 1:
                seen = self.model, self.request.selection, self.request.loss, fitting
                check_reached(*seen)
                rounding = self.request.curvature is None and is_stationary(*seen)
                findings = replace(findings, gradients_are_rounding=rounding)
            defended, losses, findings = self._gradients(problem.reference, fitting, number, shown.advance, findings)
            samples, loss, defence = len(losses), float(losses.double().mean()), defended.defence
            slopes = forked_generator(self.request.seed, f"slopes {number}")
            asking = Asking.of(self, fitting, spare, defended, slopes, shown.try_one)
            learns = final or self._holds_out_anew
            problem = asking.stated(replace(problem, factor=defended.factor), learns=learns)
            compares = self.request.compares_rows and self.storage.compares_rows and defended.is_clean
            if compares and rows_in_batches(self.request, fitting):
                single = SingleRows(self, problem.reference, fitting, number)
                problem = replace(problem, rows_of_samples=single.take)
            alone = solver.needs_held_out and not asking.trials.held_out
            findings = replace(findings, label_noise=asking.label_noise, nothing_held_out=alone)
        if solver.needs_inputs:
            weights = self.disturb(problem.reference, self.noise_generator)
            inputs = LayerInputs(self.model, self.request.selection, fitting, self.request.loss, weights)
            problem = replace(problem, inputs=inputs)
        shown.choose(number)
        solution = self._solution(problem, number)
        few = few_classes(self.model, self.request.loss, fitting) if fitting else None
        findings = replace(findings, few_classes=few, passes=self._let_go(problem.factor))
        if single is not None:
            findings = replace(findings, rows_of_samples_left=single.left)
            self._let_go(single.file)
        if asking is not None and asking.watched.share_of_largest is not None:
            findings = replace(findings, one_sample_rules=asking.watched.share_of_largest)
        if defence is not None and defence.said():
            findings = replace(findings, gradients_cleaned=defence.said())
        return solution, samples, loss, findings

    def _samples(
        self, sparsity: float, shown: StageProgress, number: int
    ) -> tuple[list[Any], list[Any], StageFindings]:
        """Draw the samples of a stage, and those held out, with the noise of the run, undone where that can be."""
        request, findings = self.request, StageFindings()
        if not (request.solver.needs_gradients or request.solver.needs_inputs):
            return [], [], findings
        held_out = min(request.samples, HELD_OUT) if request.solver.needs_held_out else 0
        fitting, spare = self.calibration.draw_apart(request.samples, held_out, request.stages)
        defence = self.sample_defence
        judges = None if defence is None or self.calibration.has_come_round else defence.judges
        fitting, spare = self.corrupt(fitting), judges or self.corrupt(spare)
        count = sum(map(batch_size, fitting))
        if self.storage.team is not None:
            self.storage.team.agree("calibration samples", [fitting, spare])
        if defence is not None:
            classes = forked_generator(request.seed, f"restoration {number}")
            fitting, spare, radius = defence.restore(self.model, fitting, spare, classes)
            findings = replace(findings, inputs_shifted_back=radius)
        shown.stage(number, sparsity, count)
        return fitting, spare, findings

    def _gradients(
        self,
        weights: Tensor,
        fitting: list[Any],
        number: int,
        advance: Callable[[int], None],
        findings: StageFindings,
    ) -> tuple[Defended, Tensor, StageFindings]:
        """Return G at weights (p,), with the noise of the run and cleaned of it; the losses; and what was found."""
        in_batches = rows_in_batches(self.request, fitting)
        rows = RowCapture(self.model, self.request, self.storage, number, in_batches)
        capture, reused = rows.capture(self.disturb(weights, self.noise_generator), fitting, advance)
        if self.storage.team is not None and number == 1:
            with eval_mode(self.model), torch.no_grad():
                self.storage.team.agree_within("losses", run_loss(self.model, fitting[0], self.request.loss))
        silent: list[str] = []
        if isinstance(capture.factor, DenseFactor):
            silent = without_gradient(capture.factor, self.request.selection)
        defended = self.defended(capture, fitting, number, self.noise_generator, in_batches=in_batches)
        all_silent = len(silent) == len(self.request.selection.names)
        findings = replace(
            findings,
            rows_reused=reused,
            one_sample_rules=share_of_largest(capture.losses, self.request.loss),
            gradients_are_zero=all_silent,
            gradients_are_rounding=findings.gradients_are_rounding and not all_silent,
            without_gradient=silent if silent and number == 1 and not all_silent else None,
            rows_clipped=defended.clipped or None,
            rows_left_out=None if defended.defence is None else defended.defence.left_out,
            noise_seen=defended.noise or None,
            noise_left=defended.left,
        )
        return defended, capture.losses, findings

    def defended(
        self, capture: Capture, fitting: list[Any], number: int, generator: torch.Generator, *, in_batches: bool
    ) -> Defended:
        """Return G with the noise of the run, and cleaned of it."""
        if isinstance(capture.factor, DenseFactor):
            noisy = self.noisy(capture.factor, generator)
            capture = replace(capture, factor=replace(noisy, limit=capture.factor.limit))
        return Defender(self.model, self.request, self.storage, number, in_batches).defend(capture, fitting)

    @property
    def _holds_out_anew(self) -> bool:
        """Whether the samples that a stage holds out are not those of later ones."""
        judges = None if self.sample_defence is None else self.sample_defence.judges
        return judges is None and self.calibration.holds_out_anew

    def _solution(self, problem: PruningProblem, number: int) -> PruningSolution:
        """Let the method solve a problem."""
        solver = self.request.solver
        try:
            return solver.solve(problem, forked_generator(self.request.seed, f"solver {number}"))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ValueError(
                f"method {solver.name!r} met numbers that are too large or too small to compute with "
                f"({first_line(error)}): check the weights, the loss and noise="
            ) from error

    def _let_go(self, factor: FisherFactor | None) -> Mapping[str, Any] | None:
        """Delete the file of a factor; return the passes that a matrix-free one took."""
        if isinstance(factor, MappedFactor) and factor.path.parent != self.storage.kept:
            factor.delete()
        return factor.log.summary() | {"way": factor.passes.way} if isinstance(factor, MatrixFreeFactor) else None

    def _finetune(
        self, settings: FineTune, kept: Tensor, elsewhere: list[str], shown: StageProgress, number: int
    ) -> list[float]:
        """Train under the mask of a stage, and the zeros of other weights; returns the mean loss of each epoch."""
        shown.train(settings.epochs, number)
        parameters, masks = dict(self.model.named_parameters()), dict(self.request.selection.split(kept))
        masks |= {name: parameters[name].detach() != 0 for name in elsewhere}
        generator, reach = forked_generator(self.request.seed, f"fine-tuning {number}"), self._paced(shown.reach)
        report = train(
            self.model, self.recalibration, settings, self.request.loss, masks, generator, reach, self.trainer
        )
        return list(report.losses)

    def _paced(self, function: Callable[..., _T]) -> Callable[..., _T]:
        """Return a function at whose calls all processes that share G wait for each other, where there are any."""
        return function if self.storage.team is None else self.storage.team.paced(function)

    def taught(self, batches: list[Any]) -> list[Taught]:
        """Return batches with what the network before pruning says of them, where there is one to ask."""
        return list(map(Taught, batches)) if self.teacher is None else self.teacher.teach(batches)

    def judges(self, batches: list[Any]) -> list[Taught]:
        """Return batches that candidates will be judged by, with what the network before pruning says of them.

        Raises:
            ValueError: If they cannot be: every candidate would have lost.
        """
        with eval_mode(self.model), torch.no_grad():
            check_calibration(self.model, self.request.loss, batches)
            if self.teacher is None:  # else its outputs are checked
                for batch in batches:
                    check_losses(run_loss(self.model, batch, self.request.loss), None)
        taught = self.taught(batches)
        for one in taught:
            if one.teacher is not None and isinstance(self.request.loss, GaussNewtonLoss):
                check_divergence(self.request.loss, one.teacher, one.batch)
        return taught

    def corrupt(self, batches: list[Any]) -> list[Any]:
        """Return batches with the noise of the run."""
        return self.request.noise.corrupt(batches, self.noise_generator, self.model, self.request.loss)

    def disturb(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Return weights with the noise of the run."""
        return self.request.noise.disturb(weights, generator, self.request.selection.slices())

    def noisy(self, factor: DenseFactor, generator: torch.Generator) -> DenseFactor:
        """Return rows of G with the noise of the run, which acts in place."""
        return self.request.noise.apply_(factor, generator, self.request.selection.slices())
