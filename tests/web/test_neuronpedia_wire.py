"""Every name that travels in Neuronpedia's shapes, written out: another project's scripts read them, so none may change by
the way it is made here."""

from collections.abc import Iterator

import server.api.neuronpedia
from server.api.neuronpedia.wire import WITH_UNDERSCORES, Shape, wire_name

AT = "modelId layer index"
LIST = "id name description defaultTestText userId createdAt updatedAt"
ENTRY = f"{AT} listId description addedAt userId"
# Columns of Neuronpedia's tables `Neuron`, `Activation`, `SourceSet` and `Source`, and what its answers add to them.
NEURON = f"""{AT} sourceSetName creatorId createdAt maxActApprox hasVector vector vectorLabel vectorDefaultSteerStrength hookName
    topkCosSimIndices topkCosSimValues neuron_alignment_indices neuron_alignment_values neuron_alignment_l1
    correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices
    correlated_features_pearson correlated_features_l1 neg_str neg_values pos_str pos_values frac_nonzero
    freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values
    decoder_weights_dist umap_cluster umap_log_feature_sparsity umap_x umap_y activations explanations headscope"""
SOURCE_SET = """modelId name hasDashboards allowInferenceSearch visibility description type creatorName urls creatorId releaseName
    defaultRange defaultShowBreaks showDfa showCorrelated showHeadAttribution showUmap createdAt"""

ANSWERED = {
    "shapes.ModelRow": """id displayNameShort displayName creatorId tlensId dimension visibility inferenceEnabled layers
        neuronsPerLayer owner website createdAt updatedAt""",
    "shapes.SourceRow": """id modelId setName hasDashboards inferenceEnabled saelensConfig visibility creatorId hasUmap
        hasUmapLogSparsity hasUmapClusters num_prompts num_tokens_in_prompt dataset notes createdAt""",
    "shapes.SourceSetRow": SOURCE_SET,
    "shapes.SourceSetWithSources": f"{SOURCE_SET} sources releases model",
    "shapes.ActivationRow": f"""{AT} id source creatorId dataIndex dataSource tokens values maxValue maxValueTokenIndex minValue
        dfaValues dfaTargetIndex dfaMaxValue zQIndices zKIndices zValues lossValues logitContributions binMin binMax binContains
        qualifyingTokenIndex createdAt headscope""",
    "shapes.Check": "row band rank dfaByHead dropped before bias preact",
    "shapes.About": "nFired family verdict",
    "shapes.ExplanationRow": f"""{AT} id source description explanationModelName typeName authorId author triggeredByUser scores
        votes createdAt""",
    "shapes.NeuronRow": NEURON,
    "shapes.NeuronWithModel": f"{NEURON} model",
    "shapes.NeuronOfSet": f"{NEURON} model sourceSet",
    "features.WholeNeuron": f"{NEURON} model creator source sourceSet comments lists",
    "features.CommentRow": f"{AT} id text userId user createdAt",
    "features.ListOfNeuron": f"{ENTRY} list",
    "collections.ListRow": LIST,
    "collections.NewListRow": f"{LIST} url user",
    "collections.ListWithNeurons": f"{LIST} user neurons activations comments",
    "collections.EntryRow": ENTRY,
    "collections.EntryWithNeuron": f"{ENTRY} neuron",
    "collections.BookmarkRow": f"{AT} id userId createdAt",
    "explanations.FoundRow": f"{AT} description explanationModelName typeName cosine_similarity neuron",
    "live.TestedRow": f"""{AT} tokens values maxValue minValue maxValueTokenIndex creatorId dataIndex dataSource createdAt
        dfaValues dfaTargetIndex dfaMaxValue""",
    "live.FoundRow": f"{AT} values maxValue maxValueIndex dfaValues dfaTargetIndex dfaMaxValue neuron",
    "live.TokenRow": "position token isSpecial topFeatures",
    "live.TopFeature": "activationValue featureIndex feature",
    "live.SteeredTexts": "STEERED DEFAULT steeredLogProbs defaultLogProbs id shareUrl limit",
}
TAKEN = {
    "wire.At": AT,
    "features.Wanted": f"{AT} maxActsToReturn",
    "features.PageOf": "modelId layer offset",
    "features.ExamplesOf": "modelId source index",
    "collections.Entry": f"{AT} description",
    "collections.NewList": "name description features",
    "collections.OfList": "listId",
    "collections.ToAdd": "listId featuresToAdd",
    "collections.OfEntry": f"listId {AT}",
    "collections.Changed": f"listId {AT} description",
    "collections.Renamed": "listId name description",
    "explanations.Query": "query offset",
    "explanations.QueryInModel": "modelId query offset",
    "explanations.QueryInSources": "modelId layers query offset",
    "explanations.Explanation": f"{AT} explanation explanationModel",
    "explanations.NewExplanation": "feature",
    "explanations.Upload": "modelId source features",
    "explanations.UploadedFeature": "index density topLogits bottomLogits explanations activations",
    "explanations.UploadedExplanation": "text methodName modelName",
    "live.TextFor": "feature customText ignoreBos",
    "live.TextForSource": "modelId source customText",
    "live.Search": "modelId sourceSet text selectedLayers sortIndexes ignoreBos densityThreshold numResults",
    "live.SearchByToken": "modelId source text numResults ignoreBos densityThreshold",
    "live.Steered": f"{AT} strength",
    "live.Steer": "modelId prompt features temperature n_tokens seed strength_multiplier steer_method stream",
}


def shapes(of: type[Shape] = Shape) -> Iterator[type[Shape]]:
    """Every shape there is."""
    for one in of.__subclasses__():
        yield one
        yield from shapes(one)


def test_every_name_that_travels_is_the_one_written_here() -> None:
    package = server.api.neuronpedia.__name__
    found = {
        f"{one.__module__.removeprefix(f'{package}.')}.{one.__name__}": {field.alias for field in one.model_fields.values()}
        for one in shapes()
    }
    assert found == {name: set(words.split()) for name, words in (ANSWERED | TAKEN).items()}


def test_names_with_underscores_are_written_out_and_used() -> None:
    used = {name for one in shapes() for name in one.model_fields}
    assert used >= WITH_UNDERSCORES
    assert {wire_name(name) for name in WITH_UNDERSCORES} == WITH_UNDERSCORES
    assert wire_name("pos_of_it") == "posOfIt", "only whole names keep their underscores"
