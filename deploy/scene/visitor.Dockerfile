# How `exec` mode is added to an image that is there already: copy the agent in, and let it start the command.
ARG TAG=local
FROM sidewarden/agent:${TAG} AS agent

FROM sidewarden-scene/services:${TAG}
COPY --from=agent /usr/bin/sidewarden-agent /usr/bin/sidewarden-agent
ENTRYPOINT ["/usr/bin/sidewarden-agent"]
