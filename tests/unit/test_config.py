"""The config tree: files, overrides, and errors of one line that name the fix."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field, ValidationError, model_validator

from ims3_ray.component import Section, first_error, nested_error
from ims3_ray.config import CompareConfig, EncoderTraining, PretrainConfig, RunConfig, SweepConfig
from ims3_ray.config.loading import as_yaml, build, load_config
from ims3_ray.config.messages import one_line
from ims3_ray.errors import UserError
from ims3_ray.models.encoder import Encoder
from ims3_ray.stages.teacher import shape_in_training

CONFIGS = Path(__file__).parents[2] / "configs"


def test_defaults_are_the_embedded_demonstration():
    config = load_config(RunConfig)
    assert config.data.path == "embedded:fashion-mnist"
    assert list(config.arms) == ["random_real", "dit", "dit_s3", "ims3"]
    assert config == RunConfig()


def test_overrides_reach_nested_keys_and_keep_their_types():
    config = load_config(RunConfig, None, ["selection.alpha=0.4", "finetune.lr=1e-4", "evaluation.seeds=[3, 4]"])
    assert (config.selection.alpha, config.finetune.lr, config.evaluation.seeds) == (0.4, 1e-4, (3, 4))
    assert config.finetune.steps == RunConfig().finetune.steps


@pytest.mark.parametrize("overrides", [["finetune.steps=300"], ["finetune={steps: 300}"]])
def test_a_length_replaces_one_of_another_kind_that_was_given_before(tmp_path: Path, overrides: list[str]):
    (tmp_path / "run.yaml").write_text("finetune: {epochs: 8}\narms: {ims3: {overrides: {finetune: {epochs: 2}}}}\n")
    config = load_config(RunConfig, tmp_path / "run.yaml")
    assert (config.finetune.steps, config.finetune.epochs) == (None, 8)
    later = load_config(RunConfig, tmp_path / "run.yaml", overrides)
    assert (later.finetune.steps, later.finetune.epochs) == (300, None)
    assert (later.of_arm("ims3").finetune.steps, later.of_arm("ims3").finetune.epochs) == (None, 2)
    assert load_config(RunConfig, tmp_path / "run.yaml", ["adopt={epochs: 3}", "adopt.steps=7"]).adopt is not None


def test_a_file_extends_another_and_overrides_come_last(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("selection: {groups: 7, alpha: 0.1}\narms: {dit: null}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\nselection: {alpha: 0.2}\n")
    config = load_config(RunConfig, tmp_path / "run.yaml", ["selection.beta=0.5"])
    assert (config.selection.groups, config.selection.alpha, config.selection.beta) == (7, 0.2, 0.5)
    assert list(config.arms) == ["random_real", "dit_s3", "ims3"]


def test_several_files_add_up_and_tables_by_number_replace_each_other(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("evaluation: {protocols: {hard: {epochs: {1: 3000, 10: 2000}, lr: 0.1}}}\n")
    (tmp_path / "b.yaml").write_text("evaluation: {protocols: {hard: {epochs: {50: 7}}}}\n")
    config = load_config(RunConfig, [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    assert config.evaluation.protocols["hard"].epochs == {50: 7}
    assert config.evaluation.protocols["hard"].lr == 0.1


def test_a_number_as_the_name_of_an_arm_leaves_the_other_arms(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("arms: {2: {title: Two, images: real, select: random}}\n")
    assert list(load_config(RunConfig, tmp_path / "a.yaml").arms) == ["random_real", "dit", "dit_s3", "ims3", "2"]
    (tmp_path / "b.yaml").write_text("extends: a.yaml\narms: {2: null}\n")
    assert list(load_config(RunConfig, tmp_path / "b.yaml").arms) == ["random_real", "dit", "dit_s3", "ims3"]


@pytest.mark.parametrize(
    ("tree", "override", "instead"),
    [
        (CompareConfig, "seed=3", "draws"),
        (CompareConfig, "selection.images_per_class=3", "budgets"),
        (SweepConfig, "seed=3", "draws"),
    ],
)
def test_an_override_without_effect_is_refused(tree: type[RunConfig], override: str, instead: str):
    with pytest.raises(UserError, match=f"'{override}' has no effect here, where {instead} takes the place"):
        load_config(tree, "methods/random", [override])
    assert load_config(RunConfig, "methods/random", [override])


@pytest.mark.parametrize("tree", [CompareConfig, SweepConfig])
def test_a_measurement_that_a_command_does_not_make_is_refused(tree: type[RunConfig]):
    with pytest.raises(UserError, match=r"'instability.images=10' has no effect here, since nothing uses it"):
        load_config(tree, "methods/random", ["instability.images=10"])


def test_a_table_of_the_paper_is_no_config_of_one_run():
    with pytest.raises(UserError, match="describes several runs; ims3 reproduce table-4 makes them"):
        load_config(RunConfig, "paper/table-4")


def test_a_pool_must_suffice_for_every_arm_and_every_budget():
    arms = "arms.x={title: X, images: generated, overrides: {selection: {groups: 20}}}"
    with pytest.raises(UserError, match=r"200 images, which are selection.groups=20 times selection.images_per_class=10"):
        load_config(RunConfig, None, ["pool.per_class=50", arms])
    load_config(CompareConfig, None, ["pool.per_class=20", "selection.groups=20", "budgets=[1]"])
    with pytest.raises(UserError, match=r"250 images, which are selection.groups=5 times budgets=50"):
        load_config(CompareConfig, None, ["pool.per_class=50", "budgets=[1, 50]"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("selection.alfa=1", "unknown config key 'selection.alfa'; did you mean 'selection.alpha'?"),
        ("selektion.alpha=1", "did you mean 'selection'?"),
        ("alpha=1", "did you mean 'selection.alpha'?"),
        ("selection.groups=0", "selection.groups=0: input should be greater than or equal to 1"),
        ("pool.per_class=20", "raise it or lower the others"),
        ("finetune.objectives.inversion_matching.grad_steps=9", "grad_steps=9 exceeds n_steps=2"),
        ("finetune={epochs: 8, steps: 120}", "set one of steps and epochs, and leave the other out"),
        ("finetune.accumulate=40", "batch_size=32 is too small for 2 workers with accumulate=40"),
        ("finetune.trainer.max_workers=1", "max_workers=1 is below num_workers=2"),
        ("finetune.trainer.max_workers=3", "trainer.max_workers needs zero_stage=0, not 1"),
        ("finetune={zero_stage: 3, compile: true}", "compile=true does not go with zero_stage=3"),
        ("arms.dit.select=all", "select: all takes the whole training split as it is; set images: real"),
        ("selection={choose: worst, coupling: selected}", "choose: worst is for coupling: pool, not for selected"),
        ("sampling.cfg_interval=[0.8, 0.2]", "cfg_interval=[0.8, 0.2] ends before it starts"),
        ("sampling.sampler=dpm", "no sampler is called 'dpm'; did you mean 'ddpm'? there is: ddim, ddpm, dpm++2m"),
        ("arms.dit.select=best", "no selector is called 'best'; there is: all, closest, confidence, first"),
        ("export=nothing", "export='nothing' is no arm; there is: random_real, dit, dit_s3, ims3"),
        ("sampling.mode_guidance.strength=0.1", "mode_guidance.strength needs sampler=ddpm, not ddim"),
        (
            "sampling={sampler: ddim, steps: 1, inverted_gaussian: {groups: 5}}",
            "inverted_gaussian.groups needs steps=2 or more, not 1",
        ),
        (
            "sampling={sampler: ddpm, inverted_gaussian: {groups: 5}}",
            "inverted_gaussian.groups needs sampler=ddim or pndm, not ddpm",
        ),
        ("synthesis.cao2.timesteps=[12, 1]", "timesteps=[12, 1] are no range of the 50 timesteps"),
        ("arms.dit.overrides={sampling: {step: 2}}", "overrides.sampling.step: there is no such key; did you mean 'steps'?"),
        ("arms.dit.title=IMS3", "arms 'dit' and 'ims3' have the title 'IMS3'; give each one of its own"),
        ("arms.dit.title=''", "arms.dit.title='': must not be empty"),
        ("selection.alpha=inf", "selection.alpha='inf': must be a finite number"),
        ("finetune.lr=1e400", "finetune.lr=inf: must be a finite number"),
        ("evaluation.seeds=[0, 1, 0]", "evaluation.seeds=[0, 1, 0]: 0 stands twice; name each once"),
        ("evaluation.seeds=[-1]", "evaluation.seeds.0=-1: input should be greater than or equal to 0"),
        ("evaluation.seeds=3", "evaluation.seeds=3: write a list, as in [3]"),
        ("evaluation.protocols.hard.students=[convnet-3, convnet-3]", "convnet-3 stands twice"),
        ("evaluation.protocols.hard.epochs=0", "config evaluation.protocols.hard.epochs=0: input should be greater"),
        ("evaluation.protocols.hard.epochs={10: 0}", "config evaluation.protocols.hard.epochs: "),
        ("selection=null", "selection=null: it has keys of its own"),
        ("arms=3", "arms=3: it holds values by name: write a name after it, as in arms.NAME=3"),
        ("data.classes=[red]", "data.classes=['red']: needs at least 2"),
        ("arms.dit.title.x=1", "must be a single text"),
        ("name=a/b", "name='a/b': use letters, digits"),
        ("storage=''", "storage='': must not be empty"),
        ("data.test_path=", "'data.test_path=' has no value; write null for none"),
        ("arms.dit.overrides={evaluation: {}}", "input should be 'finetune', 'sampling', 'selection', 'pool', 'synthesis'"),
        ("arms.dit.overrides={data: {classes: [a, b]}}", "overrides.data.classes: arms share their data"),
        ("arms.random_real.overrides={data: {size: 14}}", "overrides.data.size: real images have the size"),
        ("arms.dit.overrides.synthesis=dm", "overrides.synthesis has keys of its own, so it cannot be 'dm'"),
        ("arms.dit.overrides={generator: {}}", "overrides.generator names weights, so it must be text"),
        ("arms.dit.synthesise=cao", "no synthesis method is called 'cao'; did you mean 'cao2'?"),
        ("arms.dit.synthesise=rded", "synthesise: rded does not start from images: generated; set images: none"),
        ("arms.mine={title: Mine, images: none, synthesise: dm}", "dm does not start from images: none; choose images, as in"),
        ("arms.random_real.weights=clusters", "weights: clusters is for samples of the generator"),
        ("arms.random_real.synthesise=cao2", "works on the generator's latents, so it needs images: generated"),
        ("arms.random_real.finetune=true", "finetune=true changes the generator, so it needs images: generated"),
        ("arms.mine={title: Mine, images: given}", "images: given and path go together"),
        ("arms.mine={title: Mine, images: given, path: x, select: herding}", "images: given leaves nothing to select"),
        ("arms.mine={title: Mine, images: none}", "images: none needs a method that makes some"),
        ("refine.steps=3", "config key 'refine' has moved: write synthesis.cao2"),
        ("arms.ims3.refine=true", "config key 'arms.ims3.refine' has moved: write arms.NAME.synthesise=cao2"),
        (
            "arms.dit.overrides={refine: {lr: 1}}",
            "'arms.dit.overrides.refine' has moved: write arms.NAME.overrides.synthesis.cao2",
        ),
        ("finetune.objectives.minimax.memory=0", "config finetune.objectives.minimax.memory=0: input should be greater than"),
        ("finetune.objectives.minmax.memory=5", "unknown config key 'finetune.objectives.minmax'; did you mean"),
        ("arms.dit.overrides={selection: {images_per_class: 3}}", "sets of other sizes cannot be compared"),
        ("evaluation.protocols.hard.augment.crop=[1, 0.5]", "crop=[1, 0.5] is no range of areas"),
        ("evaluation.protocols={hard: null}", "config evaluation.protocols: needs at least 1"),
        ("name=artifacts", "name 'artifacts' is taken"),
        ("selection.alpha", "not of the form key=value"),
    ],
)
def test_bad_values_are_one_line_that_names_the_fix(override: str, says: str):
    with pytest.raises(UserError) as caught:
        load_config(RunConfig, None, [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["budgets=[0]", "budgets=[-1, 1]", "budgets=[1, 1]", "draws=[0, 0]", "draws=[-1]"])
def test_a_comparison_is_of_distinct_numbers_of_images_and_seeds(override: str):
    with pytest.raises(UserError, match=r"greater than or equal to|stands twice"):
        load_config(CompareConfig, "methods/random", [override])


def test_a_sweep_varies_something():
    with pytest.raises(UserError, match="space has no setting that varies"):
        load_config(SweepConfig, None, ["space={}"])


def test_alpha_and_beta_both_zero_is_refused():
    with pytest.raises(UserError, match="alpha and beta are both 0"):
        load_config(RunConfig, None, ["selection.alpha=0", "selection.beta=0"])


def test_a_circle_of_files_and_a_missing_file_are_errors(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError, match="extends itself"):
        load_config(RunConfig, tmp_path / "a.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(RunConfig, tmp_path / "none.yaml")


def test_a_list_that_is_too_short_is_told_within_the_settings_of_a_component_too():
    class Inner(Section):
        values: tuple[int, ...] = Field(default=(1, 2), min_length=2)

    class Outer(Section):
        @model_validator(mode="before")
        @classmethod
        def _checked(cls, values: Any) -> Any:
            try:
                Inner.model_validate(values)
            except ValidationError as error:
                kind, message, location, given = first_error(error)
                raise nested_error(kind, message, ("inner", *location), given) from error

    with pytest.raises(ValidationError) as raised:
        Outer.model_validate({"values": [1]})
    assert one_line(Outer, raised.value) == "config inner.values=[1]: needs at least 2"


def test_pretraining_uses_the_same_tree():
    assert load_config(PretrainConfig, None, ["generator.depth=3"]).generator.depth == 3


@pytest.mark.parametrize("name", ["rded", "sre2l"])
def test_the_teacher_of_a_published_protocol_is_a_whole_resnet_18(name: str):
    training = load_config(RunConfig, CONFIGS / "protocols" / f"{name}.yaml").evaluation.teacher.training
    encoder = Encoder(shape_in_training(training, 3, 10))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 11_181_642


def test_a_network_on_the_command_line_has_none_of_the_arguments_of_another_in_the_files(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text("encoder: {model: resnet34, model_args: {layers: [1, 1, 1, 1]}}\n")
    read = partial(load_config, PretrainConfig, file)
    assert read(["encoder.model=resnet50"]).encoder.model_args == {}
    assert read(["encoder={model: resnet50}"]).encoder.model_args == {}
    both = ["encoder.model_args={layers: [2, 1, 1, 1]}", "encoder.model=resnet50"]
    assert read(both).encoder.model_args == {"layers": [2, 1, 1, 1]}
    assert read(["encoder.epochs=3"]).encoder.model_args == {"layers": [1, 1, 1, 1]}


def test_arguments_of_a_network_replace_those_of_the_default_network():
    small = RunConfig().evaluation.teacher.training.model_args
    for overrides, expected in (
        ([], small),
        (["evaluation.teacher.training.model=resnet34"], {}),
        (["evaluation.teacher.training.epochs=3"], small),
        (["evaluation.teacher.training.model_args={layers: [2, 2, 2, 2]}"], {"layers": [2, 2, 2, 2]}),
    ):
        config = load_config(RunConfig, None, overrides)
        assert config.evaluation.teacher.training.model_args == expected
        assert build(RunConfig, yaml.safe_load(as_yaml(config)) or {}) == config
    assert EncoderTraining(model="resnet50").model_args == {}
