#!/usr/bin/env bash
# On a spot machine of AWS: drains this Ray node when AWS announces its end, which it does two minutes before. Training
# then writes a checkpoint at once and goes on elsewhere; Ray itself does not read the announcement.
#
#   nohup bash spot_notice.sh > spot_notice.log 2>&1 &      beside `ray start`, as ray_cluster.yaml does
#
# Needs curl, and ray on the PATH. On other machines it finds no announcement, ever.
set -euo pipefail

METADATA=${METADATA:-http://169.254.169.254/latest}  # the machine's own, see AWS's "instance metadata service"
PAUSE_S=${PAUSE_S:-5}  # as often as AWS advises
LEFT_S=110  # of the two minutes, after a pause and the asking

notice() {
    local token
    token=$(curl -sf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$METADATA/api/token") &&
        curl -sf -m 2 -H "X-aws-ec2-metadata-token: $token" "$METADATA/meta-data/spot/instance-action"
}

echo "$(date -Is) asking $METADATA for the announcement of this machine's end every $PAUSE_S s"
until announced=$(notice); do sleep "$PAUSE_S"; done
echo "$(date -Is) announced: $announced; draining this node"
until ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "AWS takes this spot machine back" \
    --deadline-remaining-seconds "$LEFT_S"; do sleep 1; done
