"""How good a model is: perplexity on text it was not trained on."""
