"""Hyperparameter search: each trial has a model and a Controller of its own."""

import pytest
from hf_runs import built, trainer

pytest.importorskip("optuna")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_each_trial_prunes_its_own_model_to_its_own_density(tmp_path):
    found = []

    def model_init(trial=None):
        density = 1.0 if trial is None else trial.suggest_categorical("density", [0.8, 0.9])
        return built(prune=["neurons"], density=density, round_to=4)

    def space(trial):
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)}

    def objective(metrics):
        found.append((apt.controller, run.model))
        return metrics["eval_loss"]

    run, apt = trainer(tmp_path, apt={"prune": None, "density": None}, more={"model_init": model_init})
    run.hyperparameter_search(space, objective, n_trials=2, direction="minimize", backend="optuna")
    assert len({id(model) for _, model in found}) == 2
    for controller, model in found:
        assert controller.model is model and controller.done and not controller.listening
        assert model.density <= model.target_density in (0.8, 0.9)
