import tomllib

import pytest
from click.testing import CliRunner

from engine.cli.main import main
from engine.core.recipe import (
    Recipe,
    RecipeError,
    load_recipe,
    override,
    preset_names,
    preset_text,
    recipe_from,
    recipe_hash,
    to_toml,
)
from engine.objective.lossfile import (
    found_otherwise,
    load_loss,
    loss_objective,
    random_weights,
    save_loss,
)
from engine.objective.terms import BY_NAME, TERM_NAMES, check_weights


def test_a_recipe_comes_back_from_its_toml() -> None:
    recipe = recipe_from({"seed": 3, "optim": {"lr": 1e-3}, "clip": {"size": 32}}, where="here")
    again = recipe_from(tomllib.loads(to_toml(recipe)), where="there")
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


def test_the_hash_sees_every_value_but_the_name() -> None:
    base = Recipe()
    assert recipe_hash(override(base, ["name=other"])) == recipe_hash(base)
    assert recipe_hash(override(base, ["optim.lr=0.5"])) != recipe_hash(base)
    assert recipe_hash(override(base, ["seed=1"])) != recipe_hash(base)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optim": {"lrr": 1.0}}, ["unknown key optim.lrr", "did you mean optim.lr?"]),
        ({"optim": {"lr": "fast"}}, ["optim.lr", "Expected `float`"]),
        ({"optim": {"lr": -1.0}}, ["optim.lr", "> 0"]),
        ({"clip": {"size": 3}}, ["clip.size", ">= 16"]),
        ({"clip": 3}, ["clip", "Expected `object`"]),
        ({"model": {"arch": "r3d_19"}}, ["model.arch", "r3d_19"]),
        ({"serch": {}}, ["unknown key serch", "did you mean search?"]),
        ({"optim": {"steps": 5, "warmup_steps": 5}}, ["optim.warmup_steps"]),
        ({"optim": {"batch_size": 6, "accumulate": 4}}, ["optim.batch_size", "optim.accumulate"]),
        ({"optim": {"batch_norm": "synced"}}, ["optim.batch_norm"]),
        ({"optim": {"ema": 1.0}}, ["optim.ema"]),
    ],
)
def test_bad_recipes_are_explained(values: dict, said: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_from(values, where="my.toml")
    assert "my.toml" in str(error.value)
    for words in said:
        assert words in str(error.value)


def test_files_that_are_no_recipes_are_explained(tmp_path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("= 3")
    with pytest.raises(RecipeError, match=r"bad\.toml: not valid TOML"):
        load_recipe(bad)
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(RecipeError, match="did you mean 'demo'"):
        load_recipe("demi")
    with pytest.raises(RecipeError, match="did you mean 'cpu/evolve' or 'cpu/pretrain'"):
        load_recipe("cpu")
    with pytest.raises(RecipeError, match="did you mean 'paper/evolve'"):
        load_recipe("paper/evolv")


def test_overrides_take_toml_values_and_bare_words() -> None:
    recipe = override(Recipe(), ["optim.name=sgd", "optim.lr=1e-2", "clip.flip=false"])
    assert (recipe.optim.name, recipe.optim.lr, recipe.clip.flip) == ("sgd", 0.01, False)
    with pytest.raises(RecipeError, match=r"section\.key=value"):
        override(Recipe(), ["optim.lr"])
    with pytest.raises(RecipeError, match=r"unknown key optim\.speed"):
        override(Recipe(), ["optim.speed=1"])


@pytest.mark.parametrize("name", preset_names())
def test_recipes_that_come_along_load(name: str) -> None:
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", preset_names("losses"))
def test_losses_that_come_along_load(name: str) -> None:
    weights = load_loss(name)
    assert tuple(weights) == TERM_NAMES
    assert any(weights.values())


def test_a_saved_loss_comes_back(tmp_path) -> None:
    weights = random_weights(5)
    save_loss(weights, tmp_path / "best.toml", name="best", about="a test")
    assert load_loss(tmp_path / "best.toml") == weights
    assert loss_objective(tmp_path / "best.toml") == {}


def test_a_loss_says_what_its_weights_go_with(tmp_path) -> None:
    """And where a recipe differs in that, one line says in what, and how to set it."""
    path, found = tmp_path / "best.toml", {"units": "gradient", "distill": "standardised"}
    save_loss(random_weights(5), path, name="best", about="a test", objective=found)
    assert loss_objective(path) == found and load_loss(path) == random_weights(5)
    assert not found_otherwise(found, load_recipe("cpu/pretrain").objective)
    assert not found_otherwise({}, load_recipe("paper/pretrain_r3d50").objective)
    line = found_otherwise(found, load_recipe("paper/pretrain_r3d50").objective)
    assert "found with objective.units = gradient and objective.distill = standardised" in line
    assert "trained with chance and l2" in line
    assert "--set objective.units=gradient --set objective.distill=standardised" in line
    assert loss_objective("random:3") == loss_objective("sec4") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[weights]\n"rgb/to_flo" = 1.0', "did you mean 'rgb/to_flow'"),
        ('[weights]\n"rgb/to_flow" = 1.5', "outside"),
        ('[weights]\n"rgb/to_flow" = nan', "outside"),
        ('[weights]\n"rgb/to_flow" = "high"', "must be a number"),
        ('[weights]\n"rgb/to_flow" = true', "must be a number"),
        ("name = 'x'", "no \\[weights\\] table"),
    ],
)
def test_bad_losses_are_explained(tmp_path, text: str, said: str) -> None:
    path = tmp_path / "loss.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said):
        load_loss(path)


def test_random_losses_are_a_function_of_the_seed() -> None:
    assert random_weights(1) == random_weights(1) == load_loss("random:1")
    assert random_weights(1) != random_weights(2)
    assert all(0.0 <= w < 1.0 for w in random_weights(3).values())
    with pytest.raises(RecipeError, match="random:SEED"):
        load_loss("random:x")


def test_the_term_table_is_the_search_space() -> None:
    assert len(TERM_NAMES) == len(set(TERM_NAMES)) == 39
    codes = [BY_NAME[name].code for name in TERM_NAMES]
    assert len(set(codes)) == 39
    assert BY_NAME["distill/flow@3"].code == "FD3"
    assert BY_NAME["rgb/shuffle"].code == "RS"


def test_missing_weights_are_zero() -> None:
    weights = check_weights({"rgb+audio/embed": 0.5})
    assert sum(weights.values()) == 0.5 and len(weights) == 39


def test_the_papers_recipes_are_the_papers() -> None:
    search = load_recipe("paper/evolve")
    assert search.search.rounds == 2000 and search.search.method == "evolution"
    assert search.model.arch == load_recipe("paper/pretrain_r3d50").model.arch == "r3d_50"
    assert load_recipe("paper/pretrain_r2plus1d50").model.arch == "r2plus1d_50"
    for name in preset_names():
        if name.startswith("paper/"):
            assert load_recipe(name).clip.num_future_frames == 4
            lines = preset_text(name).splitlines()
            chosen = [line for line in lines if line.startswith("# chosen: ")]
            assert len(chosen) >= 8 and all(len(line) > 40 for line in chosen)


def test_recipes_are_listed_and_printed() -> None:
    listed = CliRunner().invoke(main, ["recipes"]).stdout
    for name in [*preset_names(), *preset_names("losses")]:
        (line,) = [x for x in listed.splitlines() if x.split()[:1] == [name]]
        assert len(line.split()) > 4 and '"' not in line[:30] and "#" not in line
    printed = CliRunner().invoke(main, ["recipes", "cpu/pretrain"]).stdout
    assert printed == preset_text("cpu/pretrain")
    assert tomllib.loads(CliRunner().invoke(main, ["recipes", "losses/equal"]).stdout)["weights"]
    wrong = CliRunner().invoke(main, ["recipes", "small"])
    assert wrong.exit_code == 2 and "did you mean 'small/evolve'" in wrong.stderr
