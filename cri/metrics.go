package cri

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc/codes"
)

// metrics of the edge. Methods and codes come from the API's own lists, so the
// number of series is bounded.
type metrics struct {
	registry *prometheus.Registry
	duration *prometheus.HistogramVec
	inFlight *prometheus.GaugeVec
	panics   *prometheus.CounterVec
	sessions *prometheus.GaugeVec
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "berth_rpc_duration_seconds",
			Help: "Time from the arrival of a CRI request to its answer.",
			// From a List out of memory to the kubelet's patience for a pull.
			Buckets: []float64{.0002, .001, .005, .025, .1, .25, .5, 1, 2.5, 10, 30, 120, 600},
		}, []string{"method", "code"}),
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "berth_rpc_in_flight",
			Help: "CRI requests that are being worked on.",
		}, []string{"method"}),
		panics: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "berth_rpc_panics_total",
			Help: "CRI requests that ended in a panic, answered as Internal.",
		}, []string{"method"}),
	}
	m.sessions = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "berth_stream_sessions",
		Help: "Open sessions of Exec, Attach and PortForward.",
	}, []string{"kind"})
	m.registry.MustRegister(m.duration, m.inFlight, m.panics, m.sessions,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// begin counts a call in and returns what counts it out.
func (m *metrics) begin(method string) func(codes.Code, time.Duration) {
	g := m.inFlight.WithLabelValues(method)
	g.Inc()
	return func(code codes.Code, took time.Duration) {
		g.Dec()
		m.duration.WithLabelValues(method, code.String()).Observe(took.Seconds())
	}
}

// Metrics is where the other parts of the daemon register theirs.
func (s *Server) Metrics() prometheus.Registerer { return s.metrics.registry }

// MetricsHandler serves /metrics in the Prometheus text format, and /healthz,
// which answers 200 "ok" as long as the lists of pods can be read.
func (s *Server) MetricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{
		// A scrape costs memory; more than two at once are refused.
		MaxRequestsInFlight: 2,
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		s.Alive()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write([]byte("ok\n"))
	})
	return mux
}

// Alive returns once the list of pods has been read. That takes microseconds
// however busy the node is; if it hangs, the daemon is broken, and the
// watchdog of the service manager is for that.
func (s *Server) Alive() { s.deps.Pods.ListPods(nil) }
