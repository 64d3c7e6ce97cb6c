{{- define "braid.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "braid.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "braid.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "braid.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Labels that select the pods of a component: (list root component) */ -}}
{{- define "braid.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "braid.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "braid.labels" -}}
{{- $root := index . 0 -}}
{{ include "braid.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end -}}

{{- /* Image of a component: (list root image defaultTag) */ -}}
{{- define "braid.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- with $root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ $image.repository }}:{{ default (index . 2) $image.tag }}
{{- end -}}

{{- /* The secret with the CURVE keys; rendering fails without one. */ -}}
{{- define "braid.keysSecret" -}}
{{- $keys := .Values.keys -}}
{{- if and $keys.existingSecret $keys.files -}}
{{- fail "keys.existingSecret and keys.files are both set: set one of them" -}}
{{- else if $keys.existingSecret -}}
{{- $keys.existingSecret -}}
{{- else if $keys.files -}}
{{- printf "%s-keys" (include "braid.fullname" .) -}}
{{- else -}}
{{- fail "keys.existingSecret is required: the link and KV sockets listen on the pod network and are encrypted with CURVE keys. Make them with `braid keys DIR`, then `kubectl create secret generic braid-keys --from-file=DIR`, then --set keys.existingSecret=braid-keys" -}}
{{- end -}}
{{- end -}}

{{- define "braid.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "braid.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- /* What every pod template starts with: (list root component values) */ -}}
{{- define "braid.pod" -}}
{{- $root := index . 0 -}}
{{- $values := index . 2 -}}
automountServiceAccountToken: false
# A service called "braid" would otherwise put BRAID_PORT=tcp://... into the environment, where the
# settings are read from.
enableServiceLinks: false
{{- with $root.Values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- include "braid.podSecurityContext" $root | nindent 2 }}
{{- end -}}

{{- /* Pod annotations; those of chart-made keys restart the pods when the keys change. */ -}}
{{- define "braid.podAnnotations" -}}
{{- $root := index . 0 -}}
{{- $values := index . 2 -}}
{{- with $values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- with $root.Values.keys.files }}
checksum/keys: {{ toJson . | sha256sum }}
{{- end }}
{{- end -}}

{{- /* Components of a role's pools, with spaces between: (list root role) */ -}}
{{- define "braid.components" -}}
{{- $role := index . 1 -}}
{{- $found := list $role -}}
{{- range (index . 0).Values.also -}}
{{- if int (default (eq $role "decode" | ternary 1 0) (get (default dict (get . $role)) "replicas")) -}}
{{- $found = append $found (printf "%s-%s" $role .name) -}}
{{- end -}}
{{- end -}}
{{- join " " $found -}}
{{- end -}}

{{- /* Names of the further models that have no prefill workers, with commas between. */ -}}
{{- define "braid.localModels" -}}
{{- $found := list -}}
{{- range .Values.also -}}
{{- if not (get (default dict .prefill) "replicas") -}}
{{- $found = append $found .model.servedName -}}
{{- end -}}
{{- end -}}
{{- join "," $found -}}
{{- end -}}
