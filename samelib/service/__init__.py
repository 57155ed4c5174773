"""A prediction service with a detector in front of its model, and the client for it (`pip install 'samelib[serve]'`).

request -> app (image files) or open_inference (tensors) -> guard (stamps) -> batching -> Defence.judge -> answer
attack -> client.RemoteGateway -> request

In front of a model that something else serves: middleware (in its app), proxy (before its server), events (its log).
They let it answer first: request -> the model's own answer -> guard -> batching -> Defence.judge -> answer, or not
"""
