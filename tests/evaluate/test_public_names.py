import halfbyte
from halfbyte.evaluate import divergence as divergence_module
from halfbyte.evaluate import perplexity as perplexity_module


def test_measuring_functions_are_exported_by_the_package():
    assert halfbyte.perplexity is perplexity_module.perplexity
    assert halfbyte.divergence is divergence_module.divergence
    assert halfbyte.DivergenceResult is divergence_module.DivergenceResult
    assert halfbyte.PerplexityResult is perplexity_module.PerplexityResult


def test_measure_a_folder_through_the_package(folder, text):
    assert halfbyte.perplexity(str(folder), text, window=16).num_windows == 6
    assert halfbyte.divergence(str(folder), str(folder), text, window=16).kl_nats == 0
