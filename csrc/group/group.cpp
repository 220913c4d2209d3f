#include "group/group.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>

#include "base/error.h"

namespace sglang_symm {

namespace {

constexpr size_t kMinArena = 64 << 10;

double parse_seconds(const std::string& key, const std::string& value) {
  char* end = nullptr;
  const double seconds = std::strtod(value.c_str(), &end);
  if (value.empty() || *end != 0 || !(seconds > 0) || seconds > 1e6) {
    fail(ErrorKind::argument, key, "='", value, "', expected seconds: a number above 0, at most 1000000");
  }
  return seconds;
}

bool parse_flag(const std::string& key, const std::string& value) {
  if (value == "1" || value == "true") return true;
  if (value == "0" || value == "false") return false;
  fail(ErrorKind::argument, key, "='", value, "', expected 0 or 1");
}

std::string json_string(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + '"';
}

}  // namespace

void GroupConfig::apply(const std::vector<std::string>& settings) {
  for (const std::string& setting : settings) {
    const size_t equals = setting.find('=');
    const std::string key = setting.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : setting.substr(equals + 1);
    if (key == "timeout") {
      deadlines.seconds = parse_seconds(key, value);
    } else if (key == "first_timeout") {
      deadlines.first_seconds = parse_seconds(key, value);
    } else if (key == "algo") {
      agreed.forced = parse_algorithm(value);
    } else if (key == "pinned") {
      agreed.pinned = parse_flag(key, value);
    } else if (key == "strict") {
      strict = parse_flag(key, value);
    } else if (key == "nccl") {
      nccl_window = value == "window";
      agreed.nccl = nccl_window || parse_flag(key, value);
    } else if (key == "process_group_on_host") {
      process_group_on_host = parse_flag(key, value);
    } else if (key == "tuning") {
      agreed.tuning = Tuning::parse(value);
      tuned = true;
    } else {
      fail(ErrorKind::argument, "unknown setting '", setting,
           "', expected timeout, first_timeout, algo, pinned, strict, tuning, nccl or process_group_on_host");
    }
  }
}

Group::Group(const GroupConfig& config) : config_(config) {
  if (config.name.empty() || config.name.size() > 100) {
    fail(ErrorKind::argument, "group name of ", config.name.size(), " characters, expected 1 to 100");
  }
  if (!config.symmetric) return;
  if (config.arena_bytes < kMinArena && !(config.arena_bytes == 0 && config.device != "cpu")) {
    fail(ErrorKind::argument, "an arena of ", config.arena_bytes, " bytes for group '", config.name,
         "', expected at least ", kMinArena, " (arena_bytes, SGLANG_SYMM_ARENA_BYTES)");
  }
  check_members(config.rank, config.world_size);
  if (!config.tuned) config_.agreed.tuning = Tuning::built_in(config.device != "cpu", config.world_size);
  backend_ = make_backend(&config_);
  arena_ = backend_->arena();
  rendezvous_ = std::make_unique<Rendezvous>(Identity{config.name, config.rank, config.world_size, agreed_text()});
  signal_ = std::make_unique<SignalCpu>(config.name, config.rank, config.world_size, config.deadlines);
}

Group::~Group() {
  if (collectives_) collectives_->drain();  // peers may need what is pending still, so `bye` comes after it
  watcher_.reset();
  collectives_.reset();
  if (arena_) ArenaRegistry::instance().retire(arena_.get());
}

std::string Group::address() const {
  if (!rendezvous_) fail(ErrorKind::argument, "group '", config_.name, "' has no symmetric memory, hence no address");
  return rendezvous_->address();
}

void Group::connect(const std::vector<std::string>& addresses, const std::string& nccl_id) {
  if (!rendezvous_ || collectives_) fail(ErrorKind::argument, "group '", config_.name, "' is connected already");
  const Deadline deadline(config_.deadlines.first_seconds);
  std::vector<Peer> peers = rendezvous_->connect(addresses, {signal_->fd(), arena_->fd()}, deadline);
  std::vector<std::pair<int, Fd>> arenas;
  for (Peer& peer : peers) {
    signal_->attach(peer.rank, std::move(peer.fds[0]));
    arenas.emplace_back(peer.rank, std::move(peer.fds[1]));
    peer.fds.clear();
  }
  rendezvous_.reset();
  SignalCpu* signal = signal_.get();
  watcher_ = std::make_unique<Watcher>(
      std::move(peers), [signal](int peer, pid_t pid, PeerEvent event) { signal->on_peer(peer, pid, event); });
  try {
    for (auto& [peer, fd] : arenas) backend_->attach(peer, std::move(fd));
    collectives_ = backend_->connect(*signal_, nccl_id);
  } catch (...) {
    signal_->fail_call(AbortKind::unmade, Descriptor{}, 0, 0);  // the others wait for this rank
    throw;
  }
  ArenaRegistry::instance().add(arena_);
}

Collectives& Group::collectives() {
  if (!collectives_) {
    fail(ErrorKind::argument, "group '", config_.name,
         "' has no symmetric memory (communicator 'process_group'), or is ", "not connected yet");
  }
  return *collectives_;
}

void Group::close() {
  if (signal_) signal_->close();
}

std::string Group::failure() const {
  const std::string sentence = signal_ ? signal_->failure() : "";
  if (!sentence.empty()) return sentence;
  const std::lock_guard lock(failed_mutex_);
  return failed_;
}

void Group::check() const {
  if (signal_) signal_->check();
  if (!process_group_failed_.load(std::memory_order_acquire)) return;
  const std::lock_guard lock(failed_mutex_);
  throw Error(ErrorKind::communication, failed_);
}

void Group::fail_process_group(const Descriptor& descriptor, const std::string& reason) {
  {
    const std::lock_guard lock(failed_mutex_);
    if (failed_.empty()) {
      failed_ =
          cat("sglang_symm: group '", config_.name, "' (", world_size(), " ranks) is broken: ", to_string(descriptor),
              " through its process group failed on rank ", rank(), ": ", reason.substr(0, reason.find('\n')),
              ". Is a rank dead or late, or did the ranks make different ",
              "calls? destroy() the group and create it again to go on");
    }
    process_group_failed_.store(true, std::memory_order_release);
  }
  check();
  fail(ErrorKind::communication, "group '", config_.name, "' is broken");
}

void* Group::allocate_output(size_t bytes, bool required, Stream stream) {
  // In a broken group a peer may still write into a block that was given back: none is handed out again.
  const bool broken = signal_ && signal_->broken();
  if (broken && required) check();
  void* block = arena_ && !broken ? arena_->allocate(bytes, stream) : nullptr;
  if (block == nullptr && arena_ && !broken && (required || config_.strict || arena_->capture_in(stream) != 0))
    throw Error(ErrorKind::out_of_memory, describe_full(bytes));
  (block != nullptr ? counters.outputs_inside : counters.outputs_outside).fetch_add(1, std::memory_order_relaxed);
  return block;
}

std::string Group::describe_full(size_t bytes) const {
  const ArenaStats s = arena_->stats();
  return cat("sglang_symm: the arena of group '", config_.name, "' on rank ", rank(), " is full: asked for ", bytes,
             " bytes, free ", s.free_bytes, ", largest free block ", s.largest_free_bytes, ", heap ", s.heap_bytes,
             ", arena ", s.arena_bytes,
             ". A larger one: arena_bytes= when the group is made, or SGLANG_SYMM_ARENA_BYTES");
}

std::string Group::agreed_text() const {
  return cat(backend_ ? cat(backend_->settings(), " ") : "", to_string(config_.agreed));
}

std::string Group::info_json() const {
  std::string by_algorithm;
  for (int i = 0; i < kAlgorithms; i++) {
    by_algorithm += cat(i == 0 ? "" : ", ", "\"", name(static_cast<Algorithm>(i)),
                        "\": ", counters.by_algorithm[static_cast<size_t>(i)].load());
  }
  const std::string broken = failure();
  const ArenaStats s = arena_ ? arena_->stats() : ArenaStats{};
  return cat("{\"name\": ", json_string(config_.name), ", \"device\": ", json_string(config_.device),
             ", \"rank\": ", rank(), ", \"world_size\": ", world_size(), ", \"communicator\": \"",
             symmetric() ? "symm" : "process_group", "\", \"broken\": ", broken.empty() ? "null" : json_string(broken),
             ", \"calls\": ", counters.calls.load(), ", \"calls_by_algorithm\": {", by_algorithm,
             "}, \"fused_calls\": ", counters.fused.load(), ", \"normed_calls\": ", counters.normed.load(),
             ", \"outputs_inside\": ", counters.outputs_inside.load(),
             ", \"outputs_outside\": ", counters.outputs_outside.load(),
             ", \"memory\": {\"arena_bytes\": ", s.arena_bytes, ", \"heap_bytes\": ", s.heap_bytes,
             ", \"allocated_bytes\": ", s.allocated_bytes, ", \"peak_bytes\": ", s.peak_bytes,
             ", \"free_bytes\": ", s.free_bytes, ", \"largest_free_bytes\": ", s.largest_free_bytes,
             ", \"live_blocks\": ", s.live_blocks, "}, \"settings\": {\"timeout\": ", config_.deadlines.seconds,
             ", \"first_timeout\": ", config_.deadlines.first_seconds,
             ", \"strict\": ", config_.strict ? "true" : "false", ", \"nccl\": ",
             !config_.agreed.nccl  ? "\"0\""
             : config_.nccl_window ? "\"window\""
                                   : "\"1\"",
             ", \"slot_bytes\": ", backend_ ? backend_->slot_bytes() : 0, ", \"agreed\": ", json_string(agreed_text()),
             ", \"tuning\": ", json_string(to_string(config_.agreed.tuning)), "}}");
}

GroupRegistry& GroupRegistry::instance() {
  static auto* registry = new GroupRegistry();  // never destroyed: ops may run while the process exits
  return *registry;
}

void GroupRegistry::add(std::shared_ptr<Group> group) {
  const std::lock_guard lock(mutex_);
  for (const auto& other : groups_) {
    if (other->config().name == group->config().name) {
      fail(ErrorKind::argument, "there is a group '", group->config().name,
           "' in this process already; destroy() it first");
    }
  }
  groups_.push_back(std::move(group));
}

std::shared_ptr<Group> GroupRegistry::find(const std::string& name) const {
  const std::shared_ptr<Group> group = find_any(name);
  if (!group->owned_by_this_process()) {
    fail(ErrorKind::argument, "group '", name,
         "' belongs to the process that this one was forked from. A child cannot ",
         "call it: both would write the same words. Make a group in this process");
  }
  return group;
}

std::shared_ptr<Group> GroupRegistry::find_any(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  std::string known;
  for (const auto& group : groups_) {
    if (group->config().name == name) return group;
    known += (known.empty() ? "" : ", ") + group->config().name;
  }
  fail(ErrorKind::argument, "no group '", name,
       "' in this process (never made, or destroyed). Groups here: ", known.empty() ? "none" : known);
}

std::shared_ptr<Group> GroupRegistry::remove(const std::string& name) {
  const std::shared_ptr<Group> group = find_any(name);
  if (group->owned_by_this_process()) group->close();
  const std::lock_guard lock(mutex_);
  groups_.erase(std::remove(groups_.begin(), groups_.end(), group), groups_.end());
  return group;
}

}  // namespace sglang_symm
