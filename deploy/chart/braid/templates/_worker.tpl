{{- /*
A pool of workers: (list root role values component), here and below. The component names the pool: the
role, and for a further model the role and its name.

A Deployment: a worker keeps nothing that outlives its process. It names itself after its pod,
announces its own address and a fresh epoch to the router, and pools start and stop in any order, so
the stable names and ordered roll-out of a StatefulSet would only make roll-outs slower.
*/ -}}
{{- define "braid.worker" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $component := index . 3 -}}
{{- $values := index . 2 -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "braid.fullname" $root }}-{{ $component }}
  labels: {{- include "braid.labels" (list $root $component) | nindent 4 }}
spec:
  {{- if not $values.autoscaling.enabled }}
  replicas: {{ $values.replicas }}
  {{- end }}
  progressDeadlineSeconds: {{ add $values.startupSeconds 600 }}
  strategy: {{- toYaml $values.strategy | nindent 4 }}
  selector:
    matchLabels: {{- include "braid.selector" (list $root $component) | nindent 6 }}
  template:
    metadata:
      labels: {{- include "braid.labels" (list $root $component) | nindent 8 }}
      {{- with include "braid.podAnnotations" . }}
      annotations: {{- . | nindent 8 }}
      {{- end }}
    spec: {{- include "braid.pod" . | nindent 6 }}
      terminationGracePeriodSeconds: {{ add $values.drainSeconds 20 }}
      containers:
        - name: {{ $role }}
          image: {{ include "braid.image" (list $root $root.Values.image.worker (printf "%s-%s" $root.Chart.AppVersion $root.Values.flavor)) }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          args: {{- include "braid.workerArgs" . | nindent 12 }}
          env: {{- include "braid.workerEnv" . | nindent 12 }}
          ports:
            - {name: http, containerPort: 8001}
            {{- if and (eq $role "prefill") (eq (int $root.Values.engine.tensorParallelSize) 1) }}
            - {name: kv, containerPort: 9200}
            {{- end }}
          # Loading weights and compiling kernels takes minutes; liveness starts only after it.
          startupProbe:
            httpGet: {path: /health, port: http}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: {{ div (add $values.startupSeconds 9) 10 }}
          livenessProbe:
            httpGet: {path: /health, port: http}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          readinessProbe:
            httpGet: {path: /ready, port: http}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: 2
          resources: {{- include "braid.workerResources" . | nindent 12 }}
          securityContext: {{- include "braid.securityContext" $root | nindent 12 }}
          volumeMounts:
            - {name: keys, mountPath: /etc/braid/keys, readOnly: true}
            - {name: tmp, mountPath: /tmp}
            - {name: run, mountPath: /run/braid}
            - {name: cache, mountPath: /cache}
            - {name: shm, mountPath: /dev/shm}
            {{- if $root.Values.model.volume }}
            - {name: models, mountPath: {{ $root.Values.model.volumeMountPath }}, readOnly: true}
            {{- end }}
      volumes:
        - name: keys
          secret: {secretName: {{ include "braid.keysSecret" $root }}, defaultMode: 0440}
        - {name: tmp, emptyDir: {}}
        - {name: run, emptyDir: {sizeLimit: 64Mi}}
        - {name: cache, emptyDir: {sizeLimit: {{ $values.cacheSize }}}}
        - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ $values.shmSize }}}}
        {{- with $root.Values.model.volume }}
        - name: models
          {{- toYaml . | nindent 10 }}
        {{- end }}
{{- end -}}

{{- /* Arguments of a worker, parsed by `braid`; what follows `--` goes to vLLM. */ -}}
{{- define "braid.workerArgs" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $values := index . 2 -}}
- {{ $role }}
- --host=0.0.0.0
- --port=8001
- --router=tcp://{{ include "braid.fullname" $root }}-link:9100
- --worker=$(POD_NAME)
- {{ printf "--model=%s" $root.Values.model.path | quote }}
- {{ printf "--served-model-name=%s" $root.Values.model.servedName | quote }}
- --block-size={{ int $root.Values.engine.blockSize }}
- --run-dir=/run/braid
- --keys-dir=/etc/braid/keys
- --drain-s={{ $values.drainSeconds }}
- --log-level={{ $root.Values.logLevel }}
{{- if eq $role "prefill" }}
# Each tensor-parallel rank serves KV on a port of its own, so several ranks take any free ones. The
# bind address says nothing of how a decode pod reaches it; the pod's own address does.
- --kv-bind=tcp://0.0.0.0:{{ eq (int $root.Values.engine.tensorParallelSize) 1 | ternary "9200" "*" }}
- --kv-advertise=$(POD_IP)
- --staging-bytes={{ int64 $values.stagingBytes }}
{{- end }}
{{- range $values.args }}
- {{ . | quote }}
{{- end }}
- "--"
- --tensor-parallel-size={{ int $root.Values.engine.tensorParallelSize }}
{{- if eq $root.Values.flavor "cpu" }}
# The CPU image has no compiler for vLLM's compiled mode.
- --enforce-eager
{{- end }}
{{- range concat $root.Values.engine.args $values.engineArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "braid.workerEnv" -}}
{{- $values := index . 2 -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
# The root file system is read-only: whatever an engine writes goes to the cache volume.
- {name: HOME, value: /cache}
- {name: HF_HOME, value: /cache/huggingface}
- {name: VLLM_CACHE_ROOT, value: /cache/vllm}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: TRITON_CACHE_DIR, value: /cache/triton}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /cache/torchinductor}
- {name: NUMBA_CACHE_DIR, value: /cache/numba}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
{{- with $values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* The pool's resources; with flavor cuda, one GPU a tensor-parallel rank. */ -}}
{{- define "braid.workerResources" -}}
{{- $root := index . 0 -}}
{{- $values := index . 2 -}}
{{- $resources := deepCopy $values.resources -}}
{{- if eq $root.Values.flavor "cuda" -}}
{{- $gpus := dict "limits" (dict "nvidia.com/gpu" (int $root.Values.engine.tensorParallelSize)) -}}
{{- $resources = mergeOverwrite $gpus $resources -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- /* The headless service of a pool: discovery of its pods for metrics, and of KV endpoints. */ -}}
{{- define "braid.workerService" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $component := index . 3 -}}
{{- $values := index . 2 -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "braid.fullname" $root }}-{{ $component }}
  labels: {{- include "braid.labels" (list $root $component) | nindent 4 }}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector: {{- include "braid.selector" (list $root $component) | nindent 4 }}
  ports:
    - {name: http, port: 8001, targetPort: http}
    {{- if and (eq $role "prefill") (eq (int $root.Values.engine.tensorParallelSize) 1) }}
    - {name: kv, port: 9200, targetPort: kv}
    {{- end }}
{{- end -}}

{{- define "braid.workerDisruptionBudget" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $component := index . 3 -}}
{{- $values := index . 2 -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "braid.fullname" $root }}-{{ $component }}
  labels: {{- include "braid.labels" (list $root $component) | nindent 4 }}
spec:
  maxUnavailable: {{ $values.podDisruptionBudget.maxUnavailable }}
  selector:
    matchLabels: {{- include "braid.selector" (list $root $component) | nindent 6 }}
{{- end -}}

{{- define "braid.workerAutoscaler" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $component := index . 3 -}}
{{- $scaling := (index . 2).autoscaling -}}
{{- if not $scaling.metrics -}}
{{- fail (printf "%s.autoscaling.metrics is required when autoscaling is enabled: docs/operations.md names the metrics to scale on" $role) -}}
{{- end -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ include "braid.fullname" $root }}-{{ $component }}
  labels: {{- include "braid.labels" (list $root $component) | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ include "braid.fullname" $root }}-{{ $component }}}
  minReplicas: {{ $scaling.minReplicas }}
  maxReplicas: {{ $scaling.maxReplicas }}
  metrics: {{- toYaml $scaling.metrics | nindent 4 }}
  {{- with $scaling.behavior }}
  behavior: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
