import pytest
from flax import nnx

from configs import (
    cifar10_vit_s_gaudi,
    digits_vit_gaudi,
    docs_gpt_gaudi,
    gpt2_gaudi,
    shakespeare_gpt_gaudi,
    vit_b_gaudi,
)
from gaudi_jax.errors import UserError
from gaudi_jax.layers import LowRankLinear
from gaudi_jax.layers.factory import GRID_LAYERS
from gaudi_jax.training import loop


@pytest.mark.parametrize("module", [cifar10_vit_s_gaudi, digits_vit_gaudi, vit_b_gaudi])
@pytest.mark.parametrize(
    "arguments", [None, "layer=dense", "recipe=paper", "recipe=budget", "smoke"]
)
def test_configs_build(module, arguments):
    config = module.get_config(arguments)
    with config.unlocked():
        config.model.update(image_size=config.data.image_size, channels=3, num_classes=10)
    loop.build_schedules(config)
    if arguments == "smoke":
        assert config.data.name.startswith("generated:")
        nnx.eval_shape(lambda: loop.build_model(config))


@pytest.mark.parametrize("module", [docs_gpt_gaudi, shakespeare_gpt_gaudi, gpt2_gaudi])
@pytest.mark.parametrize("layer", ["low_rank", *GRID_LAYERS])
@pytest.mark.parametrize("recipe", ["", "recipe=search,", "recipe=budget,"])
def test_text_configs_build_with_rivals_of_gaudi_layers(module, layer, recipe):
    text = "text=here," if module is shakespeare_gpt_gaudi else ""
    config = module.get_config(f"{text}{recipe}layer={layer},budget=0.3")
    with config.unlocked():
        config.model.update(vocab_size=512, context=config.data.block)
    loop.build_schedules(config)
    model = nnx.eval_shape(lambda: loop.build_model(config))
    kind = {"low_rank": LowRankLinear, **GRID_LAYERS}[layer]
    layers = [module for _, module in nnx.iter_modules(model.blocks) if isinstance(module, kind)]
    if config.compress.method == "none":
        assert layers
        for each in layers:
            share = int(each.multiplications()) / (each.in_features * each.out_features)
            assert 0.25 <= share <= 0.3  # the rest is less than a rank
    else:  # the dense layers become such layers later
        assert config.compress.method == layer
        assert not layers
        assert recipe != "recipe=budget,"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("recipe=paper,layer=dense", "'recipe' has no effect on dense layers"),
        ("recipe=paper,attention=dense,mlp=low_rank", "'recipe' has no effect without Gaudi"),
        ("layer=dense,budget=0.2", "'budget' has no effect on dense layers"),
        ("recipe=paper,budget=0.2", "'budget' has no effect on recipe=paper"),
        ("layer=dense,attention=gaudi,mlp=low_rank", "'layer' has no effect beside attention"),
        ("smoke,data=folder:here", "'data' has no effect beside smoke"),
        ("epochs=3,smoke", "'epochs' has no effect beside smoke"),
        ("recipe=search,layer=dense", "'recipe' has no effect on dense layers"),
        ("recipe=search,attention=low_rank", "all layers of one kind"),
        ("recipe=magic", "unknown recipe 'magic'"),
        ("budget=0", r"budget=0.0 is outside \(0, 1\]"),
        ("smoke=True", "'smoke=True' must be written smoke"),
        ("budget", "'budget' must be written budget=VALUE"),
    ],
)
def test_arguments_that_are_wrong_or_change_nothing_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        vit_b_gaudi.get_config(arguments)


def test_the_budget_of_a_low_rank_part_counts_beside_the_paper_recipe():
    config = vit_b_gaudi.get_config("recipe=paper,attention=low_rank,budget=0.2")
    assert config.layer.attention.budget == 0.2
    assert config.layer.mlp.name == "gaudi"
    assert config.controller.name == "threshold"


def test_options_of_one_part_leave_the_others_as_they_are():
    config = digits_vit_gaudi.get_config("recipe=budget")
    config.layer.attention.density = 0.25
    assert config.layer.mlp.density is None


def test_the_published_recipe_of_gpt2_keeps_its_start_and_its_learning_rates():
    config = gpt2_gaudi.get_config()
    assert {config.layer[part].density for part in ("attention", "mlp")} == {0.25}
    assert config.optimizer.factor_scale == 1.0


@pytest.mark.parametrize(
    ("module", "arguments", "scale", "by_width"),
    [
        (shakespeare_gpt_gaudi, "text=here,recipe=budget", 1.0, False),
        (shakespeare_gpt_gaudi, "text=here,recipe=budget,size=gpu", 4.0, False),
        (shakespeare_gpt_gaudi, "text=here,recipe=paper", 1.0, False),
        (shakespeare_gpt_gaudi, "text=here,recipe=search", 2.0, True),
        (shakespeare_gpt_gaudi, "text=here,recipe=spread,size=gpu", 4.0, True),
        (shakespeare_gpt_gaudi, "text=here,recipe=spread,layer=low_rank", 2.0, False),
        (shakespeare_gpt_gaudi, "text=here,recipe=spread", 1.0, True),
        (docs_gpt_gaudi, "recipe=budget", 1.0, False),
        (docs_gpt_gaudi, "recipe=spread", 1.0, True),
        (docs_gpt_gaudi, "recipe=spread,layer=monarch", 2.0, False),
        (digits_vit_gaudi, "recipe=budget", 1.0, False),
        (digits_vit_gaudi, "recipe=search", 1.0, True),
        (vit_b_gaudi, "recipe=search", 4.0, True),
    ],
)
def test_how_fast_factors_learn(module, arguments, scale, by_width):
    optimizer = module.get_config(arguments).optimizer
    assert (optimizer.factor_scale, bool(optimizer.scale_by_width)) == (scale, by_width)


@pytest.mark.parametrize(
    ("module", "arguments", "method"),
    [
        (docs_gpt_gaudi, None, "spread"),
        (shakespeare_gpt_gaudi, "text=here", "spread"),
        (cifar10_vit_s_gaudi, None, "gaudi"),
        (vit_b_gaudi, None, "gaudi"),
        (digits_vit_gaudi, None, "none"),
        (gpt2_gaudi, None, "none"),
    ],
)
def test_the_recipes_of_configs_that_name_none(module, arguments, method):
    assert module.get_config(arguments).compress.method == method


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        ("layer=gaudi", "gaudi"),
        ("layer=gaudi,recipe=spread", "spread"),
        ("layer=low_rank", "low_rank"),
        ("layer=low_rank,recipe=search", "low_rank"),
    ],
)
def test_by_default_layers_are_dense_for_three_tenths_of_the_steps(arguments, method):
    config = vit_b_gaudi.get_config(f"{arguments},budget=0.25")
    assert config.compress.method == method
    assert config.compress.stages == ((0.3, 0.25),)
    assert {options.name for options in config.layer.values()} == {"dense"}


def test_cifar_has_a_size_for_a_cpu():
    config = cifar10_vit_s_gaudi.get_config("size=cpu,layer=dense")
    assert (config.model.width, config.model.dtype, config.train.steps) == (96, "float32", 2000)
    with pytest.raises(UserError, match="unknown size 'tpu'"):
        cifar10_vit_s_gaudi.get_config("size=tpu")
    with pytest.raises(UserError, match="'epochs' has no effect with size=cpu"):
        cifar10_vit_s_gaudi.get_config("size=cpu,epochs=3")
