"""A prediction service with a detector in front of its model, and the client for it (`pip install 'samelib[serve]'`).

request -> app (image files) or open_inference (tensors) -> guard (stamps) -> batching -> Defence.judge -> answer
attack -> client.RemoteGateway -> request
"""
